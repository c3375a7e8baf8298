"""The report as a browser renders it: right numbers, whole images, no sideways scrolling, readable in the dark."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from robust import Classifier, Linf, Verdict, evaluate, load_data
from tests.robust.browsing import CONTRAST, SIZES, launched, opened, shown


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the digits: a quickly trained network, two radii; some samples stand, some fall."""
    torch.manual_seed(0)
    x, y = load_data("digits", train=True).tensors()
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(60):
        loss = nn.functional.cross_entropy(module(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = tmp_path_factory.mktemp("runs") / "digits"
    evaluate(
        Classifier(module.eval(), name="digits-mlp"),
        load_data("digits", n=60),
        threat=[Linf(0.05), Linf(0.1)],
        suite=["fgsm", "pgd"],
        out=out,
    )
    return out


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Any]:
    """One browser for all tests."""
    with launched(chromium) as found:
        yield found


@pytest.fixture(params=SIZES)
def page(request: pytest.FixtureRequest, browser: Any, run_folder: Path) -> Iterator[Any]:
    """The report at one width; see `opened`."""
    with opened(browser, request.param, run_folder / "report.html") as found:
        yield found


@pytest.fixture(scope="module")
def verdict(run_folder: Path) -> Verdict:
    """What the report is about."""
    return Verdict.load(run_folder)


def test_the_headline_shows_the_verdicts_numbers(page: Any, verdict: Verdict) -> None:
    assert shown(page, "#clean-accuracy") == f"{100 * verdict.clean_accuracy:.1f} %"
    assert shown(page, "#robust-accuracy") == f"{100 * verdict.robust_accuracy:.1f} %"
    assert 0 < verdict.robust_accuracy < verdict.clean_accuracy
    assert (
        page.title() == f"digits-mlp on digits: {100 * verdict.robust_accuracy:.1f}\u00a0% robust at linf 0.1"
    )
    rows = page.locator("#curve-table tbody tr").all_inner_texts()
    assert len(rows) == 3
    for row, (_, accuracy) in zip(rows[1:], verdict.curve, strict=True):
        assert f"{100 * accuracy:.1f}\u00a0%" in row


def test_nothing_sticks_out_sideways(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    outside = page.evaluate(
        """() => [...document.querySelectorAll('body *')]
             .filter(e => !e.closest('.scroll, .quiet, svg') && e.checkVisibility())
             .filter(e => e.getBoundingClientRect().right > innerWidth + 0.5)
             .map(e => e.className || e.tagName)"""
    )
    assert outside == []


def test_the_gallery_shows_whole_images(page: Any, verdict: Verdict) -> None:
    broken = sum(by is not None for by in verdict.broken_by)
    assert page.locator(".sample").count() == min(12, broken)
    sizes = page.evaluate(
        """() => [...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.width, i.alt,
             getComputedStyle(i).imageRendering])"""
    )
    assert len(sizes) == 3 * min(12, broken)
    for complete, width, height, drawn, alt, rendering in sizes:
        assert complete
        assert (width, height) == (8, 8)
        assert drawn >= 60
        assert alt
        assert rendering == "pixelated"


def test_the_page_asks_for_nothing_and_complains_about_nothing(page: Any, run_folder: Path) -> None:
    assert page.complaints == []
    asked = [url for url in page.requests if not url.startswith("data:")]
    assert asked == [(run_folder / "report.html").as_uri()]


def test_the_waterfall_is_drawn_to_scale(page: Any, verdict: Verdict) -> None:
    width = page.evaluate("document.querySelector('.waterfall .all .track').getBoundingClientRect().width")
    bar = page.evaluate(
        "document.querySelector('.waterfall .robust .track span').getBoundingClientRect().width"
    )
    assert bar / width == pytest.approx(verdict.robust_accuracy, abs=0.01)


def test_the_curve_falls_from_clean_to_robust(page: Any, verdict: Verdict) -> None:
    centres = page.evaluate(
        "() => [...document.querySelectorAll('.curve circle')].map(c => [c.cx.baseVal.value, c.cy.baseVal.value])"
    )
    assert len(centres) == 1 + len(verdict.curve)
    assert [x for x, _ in centres] == sorted(x for x, _ in centres)
    accuracies = [verdict.clean_accuracy, *(accuracy for _, accuracy in verdict.curve)]
    scale = (centres[-1][1] - centres[0][1]) / (accuracies[0] - accuracies[-1])
    assert centres[1][1] - centres[0][1] == pytest.approx(scale * (accuracies[0] - accuracies[1]), abs=0.2)
    overlapping = page.evaluate(
        """() => { const boxes = [...document.querySelectorAll('.curve text')].map(t => t.getBoundingClientRect());
             return boxes.some((a, i) => boxes.slice(i + 1).some(b =>
               a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom)); }"""
    )
    assert not overlapping
    frame = page.evaluate("document.querySelector('.curve').getBoundingClientRect().left")
    leftmost = page.evaluate(
        "Math.min(...[...document.querySelectorAll('.curve text')].map(t => t.getBoundingClientRect().left))"
    )
    assert leftmost >= frame - 0.5


def test_doubts_are_shown_and_reached_from_the_top(page: Any, verdict: Verdict) -> None:
    assert verdict.warnings  # only 60 samples
    assert page.locator(".warnings li").all_inner_texts() == verdict.warnings
    page.click(".chips .doubtful a")
    assert page.evaluate("document.querySelector('#doubts').getBoundingClientRect().top < innerHeight")


def test_details_open_with_the_keyboard(page: Any) -> None:
    names = []
    for _ in range(40):
        page.keyboard.press("Tab")
        focused = page.evaluate(
            "document.activeElement.tagName + ': ' + document.activeElement.textContent.trim().slice(0, 30)"
        )
        names.append(focused)
        if focused.startswith("SUMMARY"):
            break
    assert names[-1] == "SUMMARY: Conditions of this run"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
    assert not page.is_visible(".facts")
    page.keyboard.press("Enter")
    assert page.is_visible(".facts")
    assert "precision original" in shown(page, ".facts")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_is_readable(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 3 * 128) == (scheme == "dark")
    found = page.evaluate(CONTRAST)
    assert len(found) > 100
    assert [(round(ratio, 2), text) for ratio, text in found if ratio < 4.5] == []


def test_headings_and_tables_make_sense_without_eyes(page: Any) -> None:
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert page.get_attribute("html", "lang") == "en"
    assert page.evaluate("[...document.images].every(i => i.alt)")
    assert page.evaluate("[...document.querySelectorAll('table')].every(t => t.querySelector('th[scope]'))")
    regions = page.evaluate(
        "[...document.querySelectorAll('.scroll')].every(r => r.tabIndex === 0 && r.ariaLabel)"
    )
    assert regions
