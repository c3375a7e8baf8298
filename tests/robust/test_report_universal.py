"""The report of a patch and of a perturbation in a real browser: what is shown, at every width, light and dark."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from robust.data import load_data
from robust.models import load_model
from robust.registry import room
from robust.threat import Linf
from robust.universal_run import UniversalRun, learn_and_measure
from tests.robust.browsing import CONTRAST, SIZES, launched, opened, shown
from tests.robust.pictures import save


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, UniversalRun]:
    """A quickly learnt patch with two photographs, and a perturbation, on the shipped digits model."""
    clf, data = load_model("zoo:digits"), load_data("digits", n=160)
    learn, unseen = data.subset(range(80)), data.subset(range(80, 160))
    others = {"zoo:digits-at": load_model("zoo:digits-at")}
    out = tmp_path_factory.mktemp("reports")
    photos = [out / "wide.png", out / "tall.png"]
    for path, size in zip(photos, ((60, 200, 3), (90, 50, 3)), strict=True):
        save(path, 1, size)
    kinds = room("attacks").load("patch"), room("attacks").load("uap")
    patch = learn_and_measure(
        kinds[0].sized(0.2, 8, 8, shape="round", steps=40),
        *(clf, learn, unseen),
        name="patch",
        target=8,
        others=others,
    )
    patch.show_photos(photos)
    uap = learn_and_measure(
        kinds[1](threat=Linf(0.2), steps=20), clf, learn, unseen, name="uap", others=others
    )
    found = {"patch": patch, "uap": uap}
    for name, run in found.items():
        run.write(out / name)
    return found


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """One browser for all tests."""
    with launched(chromium) as found:
        yield found


@pytest.fixture(params=[(name, size) for name in ("patch", "uap") for size in SIZES], ids="-".join)
def page(request: pytest.FixtureRequest, browser: Any, runs: dict[str, UniversalRun]) -> Iterator[Any]:
    """A report at one width, with the run that it tells of; see `opened`."""
    name, size = request.param
    with opened(browser, size, Path(runs[name].summary["out"]) / "report.html") as found:
        found.run = runs[name]
        yield found


def test_the_numbers_are_the_run_s(page: Any) -> None:
    summary = page.run.summary
    assert shown(page, "#success-rate") == f"{100 * summary['success_rate']:.1f} %"
    assert shown(page, "#clean-accuracy") == f"{100 * summary['clean_accuracy']:.1f} %"
    rows = page.locator("#rate-table tbody tr").all_inner_texts()
    expected = [summary, *([summary["printed"]] if page.run.is_patch else []), *summary["transfer"]]
    assert len(rows) == len(expected)
    for row, want in zip(rows, expected, strict=True):
        assert f"{100 * want['success_rate']:.1f}\u00a0%" in row
        assert "control" not in want or f"{100 * want['control']['success_rate']:.1f}\u00a0%" in row
    assert "zoo:digits-at" in rows[-1]


def test_what_was_learnt_its_placements_and_photographs_are_drawn(page: Any) -> None:
    patch, count = page.run.is_patch, min(12, page.run.summary["attempted"])
    assert page.locator(".sample").count() == count
    images = page.evaluate(
        "() => [...document.images].map(i => [i.complete, i.naturalWidth, i.width, i.alt])"
    )
    assert len(images) == 1 + 2 * count + (2 if patch else 0)
    for complete, natural, drawn, alt in images:
        assert complete
        assert natural > 0
        assert drawn >= 60
        assert alt
    fooled = page.locator(".sample.fell").count()
    rows = page.run.outcome.attempted.nonzero()[:count, 0]
    assert fooled == int(page.run.outcome.fooled[rows].sum())
    if patch:
        assert page.evaluate("[...document.querySelectorAll('.photo img')].map(i => i.naturalWidth)") == [
            200,
            50,
        ]
        assert "1,181 × 1,181 dots at 300 dpi" in shown(page, "#print")


def test_success_over_scale_and_angle_is_drawn_to_scale(page: Any) -> None:
    grid = page.run.grid
    assert page.locator(".heat").count() == page.run.is_patch
    if grid is None:
        return
    cells = page.locator(".heat tbody td").all_inner_texts()
    assert [int(cell) for cell in cells] == [round(100 * rate) for row in grid.rates for rate in row]
    heights = page.evaluate(
        """() => [...document.querySelectorAll('.curves svg')].map(s =>
             [...s.querySelectorAll('circle')].map(c => c.cy.baseVal.value))"""
    )
    upright = [row[grid.angles.index(0.0)] for row in grid.rates]
    for drawn, rates in zip(heights, (grid.rates[grid.scales.index(1.0)], upright), strict=True):
        assert len(drawn) == len(rates)
        for one, two in pairwise(zip(drawn, rates, strict=True)):
            assert one[0] - two[0] == pytest.approx(212 * (two[1] - one[1]), abs=0.2)


def test_nothing_sticks_out_or_overlaps(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
             .filter(e => !e.closest('.scroll, .quiet, svg') && e.checkVisibility())
             .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
             .map(e => e.className || e.tagName)"""
    )
    assert outside == []
    overlapping = page.evaluate(
        """() => [...document.querySelectorAll('.curve')].some(curve => {
             const boxes = [...curve.querySelectorAll('text')].map(t => t.getBoundingClientRect());
             return boxes.some((a, i) => boxes.slice(i + 1).some(b =>
               a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)); })"""
    )
    assert not overlapping


def test_it_loads_nothing_and_complains_about_nothing(page: Any) -> None:
    assert page.complaints == []
    assert [url for url in page.requests if not url.startswith("data:")] == [page.address]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = page.evaluate(CONTRAST)
    assert len(found) > 60
    assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []


def test_headings_tables_and_names_make_sense_without_eyes(page: Any) -> None:
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.querySelector('th[scope]'))")
    ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))
    named = page.evaluate(
        """() => [...document.querySelectorAll('[aria-labelledby]')]
             .every(e => document.getElementById(e.getAttribute('aria-labelledby')))"""
    )
    assert named


def test_the_page_is_whole_without_a_browser(runs: dict[str, UniversalRun]) -> None:
    for name, run in runs.items():
        text = (Path(run.summary["out"]) / "report.html").read_text()
        assert text.rstrip().endswith("</html>")
        assert ("In photographs" in text) == (name == "patch")
        assert torch.isfinite(torch.tensor(run.summary["interval"])).all()
