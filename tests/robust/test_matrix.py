"""The matrix: its cells are `evaluate`'s verdicts and patches on unseen samples; it resumes, and can be verified."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from robust import Classifier, Linf, Verdict, evaluate, load_data, load_model
from robust.adaptive import KINDS
from robust.cli.settings import make_defenses
from robust.defense import Defense, compose
from robust.digest import sample_digest
from robust.errors import ConfigError, RobustError, RunError, VerificationError
from robust.matrix import Row, Setup, measure, verify
from robust.matrix_patch import PatchSettings, unseen_rows, verify_patch
from robust.registry import room
from robust.report_matrix import FIGURE, PAGE, RECORD, entries, heads, heat_map, write_matrix
from tests.robust.browsing import CONTRAST, SIZES, launched, opened, shown

EPS, N = 0.2, 8
NOISY, HIDING = "digits + gaussian-noise", "digits + bit-depth:bits=2"


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    clf = load_model("zoo:digits", device="cpu")
    behind = {
        f"digits + {text}": compose(clf, make_defenses([text]))
        for text in ("gaussian-noise", "bit-depth:bits=2")
    }
    models = {"digits": clf, **behind, "at": load_model("zoo:digits-at", device="cpu")}
    return [Row(name, model) for name, model in models.items()]


@pytest.fixture(scope="module")
def setup() -> Setup:
    data, surrogate = load_data("digits", n=40), load_model("zoo:digits-at", device="cpu")
    return Setup(
        data.subset(range(N)), Linf(EPS), data.subset(range(N, 40)), ("quick", "patch", "transfer"), (surrogate,),
        patch=PatchSettings(0.2, 40),
    )  # fmt: skip


@pytest.fixture(scope="module")
def measured(
    rows: list[Row], setup: Setup, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], Path]:
    out = tmp_path_factory.mktemp("matrix") / "m"
    record = measure(rows, setup, out)
    write_matrix(record, out)
    return record, out


def row_of(record: dict[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in record["rows"] if row["name"] == name)
    return found


def test_a_cell_is_the_verdict_of_evaluate_on_the_same(
    measured: tuple[dict[str, Any], Path], rows: list[Row], setup: Setup
) -> None:
    record, out = measured
    for row in rows[:3]:
        for column in ("quick", "transfer"):
            cell = row_of(record, row.name)["cells"][column]
            crafted = setup.surrogates if column == "transfer" else ()
            same = evaluate(row.model, setup.data, threat=setup.threat, suite=column, surrogates=crafted)
            stored = Verdict.load(out / cell["folder"])
            assert (cell["accuracy"], cell["non_adaptive"]) == (same.robust_accuracy, same.non_adaptive)
            assert torch.equal(stored.adversarial, same.adversarial)
            unaware = sum(name in KINDS.values() for name in same.broken_by)
            assert cell["alone"] == pytest.approx(same.robust_accuracy + unaware / N)
            stored.verify(row.model, setup.data)


def test_randomised_rows_are_attacked_with_averaged_gradients(measured: tuple[dict[str, Any], Path]) -> None:
    for row in measured[0]["rows"]:
        copies = {stage.get("copies", 1) for stage in row["cells"]["quick"]["stages"]}
        assert copies == ({20} if row["randomised"] else {1})
    assert row_of(measured[0], NOISY)["randomised"]


def test_clean_is_the_same_in_every_column_and_worst_is_taken_sample_by_sample(
    measured: tuple[dict[str, Any], Path], rows: list[Row]
) -> None:
    record, out = measured
    for row in record["rows"]:
        samples = json.loads((out / row["cells"]["patch"]["folder"] / "samples.json").read_text())
        standing = torch.tensor(samples["clean"]) == torch.tensor(samples["y"])
        for column in ("quick", "transfer"):
            verdict = Verdict.load(out / row["cells"][column]["folder"])
            assert verdict.clean_accuracy == row["clean"]["accuracy"] == standing.double().mean()
        standing &= torch.tensor(samples["changed"]) == torch.tensor(samples["y"])
        assert int(standing.sum()) == row["cells"]["patch"]["standing"]
        for column in ("quick", "transfer"):
            standing &= Verdict.load(out / row["cells"][column]["folder"]).robust
        assert row["worst"]["standing"] == int(standing.sum())
        assert row["worst"]["accuracy"] <= min(cell["accuracy"] for cell in row["cells"].values())


def test_the_most_overstated_number_is_told_of_defended_rows_only(
    measured: tuple[dict[str, Any], Path],
) -> None:
    record = measured[0]
    assert row_of(record, "digits")["overstated"] is None
    hidden = row_of(record, HIDING)
    told = hidden["overstated"]
    beside = [cell["non_adaptive"] for cell in hidden["cells"].values() if cell["non_adaptive"]]
    assert told["by"] == max(item["overstated"] for item in beside)
    assert (told["kind"], told["by"]) == ("naive", pytest.approx(hidden["clean"]["accuracy"], abs=0.1))


def test_a_patch_is_measured_on_samples_that_it_was_not_learnt_on(
    measured: tuple[dict[str, Any], Path], setup: Setup
) -> None:
    record, out = measured
    digests = {sample_digest(*setup.data[i]) for i in range(N)}
    for row in record["rows"]:
        stored = json.loads((out / row["cells"]["patch"]["folder"] / "samples.json").read_text())
        assert len(stored["learnt"]) == row["cells"]["patch"]["learnt_on"] == 32
        assert not digests & {*stored["learnt"]}
        assert len(stored["y"]) == N


def test_rows_that_are_measured_samples_again_are_not_learnt_from() -> None:
    data = load_data("digits", n=6)
    twice = data.subset([0, 1, 2, 1, 3, 0, 4])
    assert unseen_rows(twice, 3) == [4, 6]


def test_a_patch_of_a_hiding_row_is_learnt_through_the_substitute(rows: list[Row], setup: Setup) -> None:
    model = next(row.model for row in rows if row.name == HIDING)
    assert setup.learn is not None
    x, y = setup.learn.tensors()
    short, long = (PatchSettings(0.2, steps).attack(setup.data.shape) for steps in (1, 20))
    with model.unaware():  # rounding has no gradient: such a patch stays the noise that it began as
        start, blind = short.fit(model, x, y).texture, long.fit(model, x, y).texture
    assert torch.equal(start, blind)
    assert not torch.equal(start, long.fit(model, x, y).texture)


def test_a_patch_of_a_randomised_row_meets_new_draws_at_every_step(
    rows: list[Row], setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[int] = []
    apply = Defense.apply

    def noted(self: Defense, x: torch.Tensor, bounds: Any, key: int, aware: bool = True) -> torch.Tensor:
        keys.append(key)
        return apply(self, x, bounds, key, aware)

    monkeypatch.setattr(Defense, "apply", noted)
    model = next(row.model for row in rows if row.name == NOISY)
    assert setup.learn is not None
    PatchSettings(0.2, 10).attack(setup.data.shape).fit(model, *setup.learn.tensors(), precision="original")
    assert len({*keys}) == len(keys) >= 10


def test_a_finished_matrix_is_read_back_and_a_wider_one_keeps_its_cells(
    measured: tuple[dict[str, Any], Path], rows: list[Row], setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, out = measured
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").rglob("*") if path.is_file()}

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a finished cell was measured again")

    monkeypatch.setattr("robust.matrix_patch.learn_and_measure", refuse)
    again = measure(rows, setup, out, resume=True)
    assert again["rows"] == record["rows"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    wider = measure(rows[:1], replace(setup, columns=("quick", "fgsm"), surrogates=()), out, resume=True)
    assert wider["rows"][0]["cells"]["quick"] == record["rows"][0]["cells"]["quick"]
    for change in ({"seed": 1}, {"threat": Linf(0.1)}, {"data": setup.data.subset(range(N - 1))}):
        with pytest.raises(RunError, match="choose another folder"):
            measure(rows[:1], replace(setup, **change), out, resume=True)
    with pytest.raises(RunError, match="add --resume"):
        measure(rows, setup, out)


class Killed(BaseException):
    """In the place of kill -9: nothing in the library catches it."""


@pytest.mark.parametrize("at", [("digits", "patch"), ("at", "quick")])
def test_a_matrix_that_was_cut_off_goes_on_to_the_same_numbers(
    at: tuple[str, str], rows: list[Row], setup: Setup, tmp_path: Path, measured: tuple[dict[str, Any], Path]
) -> None:
    few = [row for row in rows if row.name in ("digits", "at")]

    def kill(fraction: float, text: str) -> None:
        if text.startswith(f"{at[0]}, {at[1]}: ") and not text.endswith("begins"):
            raise Killed

    with pytest.raises(Killed):
        measure(few, setup, tmp_path / "m", progress=kill)
    held = {path: path.read_bytes() for path in tmp_path.rglob("digests.json")}
    went_on: list[str] = []
    found = measure(
        few, setup, tmp_path / "m", resume=True, progress=lambda fraction, text: went_on.append(text)
    )
    assert all(path.read_bytes() == content for path, content in held.items())
    for row in found["rows"]:
        same = row_of(measured[0], row["name"])
        assert row["worst"] == same["worst"]
        for column, cell in row["cells"].items():
            assert cell["interval"] == same["cells"][column]["interval"]
    assert not any(text.startswith("digits, quick: samples") for text in went_on)  # it was finished


def test_verify_holds_every_cell_against_the_models_and_the_data(
    measured: tuple[dict[str, Any], Path], rows: list[Row], setup: Setup
) -> None:
    found = verify(rows, setup, measured[1])
    assert found["cells"] == len(rows) * 3
    assert found["examples"] > 0
    with pytest.raises(VerificationError, match=r"digits, quick: the model is not the one"):
        verify([replace(rows[0], model=rows[-1].model)], setup, measured[1])
    with pytest.raises(RunError, match="is no run folder"):
        verify(rows, replace(setup, columns=("fgsm",)), measured[1] / "elsewhere")


def _alter(change: Callable[[dict[str, Any]], None], name: str) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        from robust.digest import file_digest, write_json

        held = json.loads((place / name).read_text())
        change(held)
        write_json(place / name, held)
        digests = json.loads((place / "digests.json").read_text())
        write_json(place / "digests.json", {**digests, name: file_digest(place / name)})

    return apply


@pytest.mark.parametrize(
    ("forge", "line"),
    [
        (lambda place: (place / "patch.safetensors").write_bytes(b""), "was altered"),
        (
            _alter(lambda held: held["changed"].__setitem__(0, 9 - held["changed"][0]), "samples.json"),
            "say|answered",
        ),
        (_alter(lambda held: held.update(learnt=[held["measured"]]), "samples.json"), "measured on"),
        (_alter(lambda held: held.update(fooled=N), "summary.json"), "does not say"),
    ],
)
def test_a_forged_patch_is_refused(
    forge: Callable[[Path], None], line: str, tmp_path: Path, rows: list[Row], setup: Setup,
    measured: tuple[dict[str, Any], Path],
) -> None:  # fmt: skip
    import shutil

    place = tmp_path / "patch"
    shutil.copytree(measured[1] / row_of(measured[0], "digits")["cells"]["patch"]["folder"], place)
    held = json.loads((place / "samples.json").read_text())
    (place / "samples.json").write_text(json.dumps({**held, "measured": sample_digest(*setup.data[0])}))
    _alter(lambda held: None, "samples.json")(place)
    assert verify_patch(place, rows[0].model, setup.data, setup.patch)["marginal_differences"] == []
    forge(place)
    with pytest.raises(VerificationError, match=line):
        verify_patch(place, rows[0].model, setup.data, setup.patch)


def test_a_larger_patch_than_asked_for_is_refused(
    measured: tuple[dict[str, Any], Path], rows: list[Row], setup: Setup
) -> None:
    place = measured[1] / row_of(measured[0], "digits")["cells"]["patch"]["folder"]
    with pytest.raises(VerificationError, match=r"more than 0\.05"):
        verify_patch(place, rows[0].model, setup.data, PatchSettings(0.05, 40))


def test_the_picture_has_a_number_for_every_entry_and_is_the_same_for_the_same_record(
    measured: tuple[dict[str, Any], Path],
) -> None:
    record, out = measured
    svg = heat_map(record).decode()
    numbers = [float(text) for text in re.findall(r"<text[^>]*>([0-9.]+)</text>", svg)]
    wanted = [
        round(100 * entry.accuracy, 1)
        for row in record["rows"]
        for entry in entries(record, row).values()
        if entry.accuracy is not None
    ]
    ticks = [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    assert sorted(numbers) == pytest.approx(sorted([*wanted, *ticks]))
    assert all(f">{row['name']}</text>" in svg for row in record["rows"])
    assert (out / FIGURE).read_text() == svg == heat_map(json.loads((out / RECORD).read_text())).decode()


class Links(HTMLParser):
    """The addresses of a page's links, and of what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if tag == "a" and name == "href" and value and not value.startswith("#"):
                self.links.append(value)
            elif name in ("src", "href") and tag in ("img", "script", "link") and value:
                self.loads.append(value)


def test_the_page_links_every_cell_to_its_report_and_loads_nothing(
    measured: tuple[dict[str, Any], Path],
) -> None:
    from urllib.parse import unquote

    record, out = measured
    page = Links((out / PAGE).read_text())
    assert len(page.links) == len(record["rows"]) * len(record["columns"])
    assert all((out / unquote(link)).is_file() for link in page.links)
    assert all(load.startswith("data:") for load in page.loads)
    assert heads(record)[0] == "clean"
    assert heads(record)[-2:] == ["worst", "claimed"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_can_be_read_on_any_screen(
    size: str, scheme: str, chromium: str, measured: tuple[dict[str, Any], Path]
) -> None:
    with launched(chromium) as browser, opened(browser, size, measured[1] / PAGE) as page:
        page.emulate_media(color_scheme=scheme)
        assert (page.complaints, page.requests) == ([], [page.address])
        assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
        assert "digits + bit-depth:bits=2" in shown(page, "#matrix-table")
        assert page.locator("#matrix-table td a").count() == 4 * 3
        page.evaluate("document.querySelector('.picture').remove()")  # its colours are no page's
        assert min(page.evaluate(CONTRAST))[0] >= 4.5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"columns": ()}, "at least one column"),
        ({"columns": ("quick", "quick")}, "quick is given twice"),
        ({"columns": ("quik",)}, "unknown suite or attack 'quik'"),
        ({"columns": ("quick",)}, "no column uses surrogates"),
        ({"learn": None}, "digits, patch: a patch is learnt on samples that it is not measured on"),
        ({"patch": PatchSettings(1.5)}, "digits, patch: a patch of 1.5"),
        ({"patch": PatchSettings(0.001)}, "pixels has none"),
        ({"patch": PatchSettings(0.1, 0)}, "0 steps teach nothing"),
        ({"threat": Linf(float("inf")), "columns": ("transfer",)}, "finite eps"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_written(
    change: dict[str, Any], line: str, rows: list[Row], setup: Setup, tmp_path: Path
) -> None:
    with pytest.raises(RobustError, match=line):
        measure(rows, replace(setup, **change), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_rows_need_names_of_their_own_that_folders_can_take(
    rows: list[Row], setup: Setup, tmp_path: Path
) -> None:
    for names, line in ((("a", "a"), "given twice"), (("a b", "a-b"), "too alike")):
        with pytest.raises(ConfigError, match=line):
            measure([Row(name, rows[0].model) for name in names], setup, tmp_path / "m")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="already holds something"):
        measure(rows, setup, tmp_path)


def test_the_stored_patch_is_reached_through_the_rooms_registry() -> None:
    assert room("attacks.patch").load("trained").__name__ == "TrainedPatch"


def test_a_manifest_may_name_another_command(tmp_path: Path) -> None:
    clf, data = load_model("zoo:digits", device="cpu"), load_data("digits", n=2)
    assert isinstance(clf, Classifier)
    found = evaluate(clf, data, threat=Linf(0.1), suite="fgsm", command=["robust", "eval", "zoo:digits"])
    assert found.manifest["command"] == ["robust", "eval", "zoo:digits"]
