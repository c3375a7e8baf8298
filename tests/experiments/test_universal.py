"""The universal experiment: its code on tiny work, and that records, figure and page say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from robust.attacks import get
from robust.attacks.patch.trained import TrainedPatch
from robust.data import load_data
from robust.digest import read_json, write_json
from robust.experiments.universal import page
from robust.experiments.universal.measure import CASES, Case, measure, record_of, transfer
from robust.models import load_model
from robust.report import clopper_pearson

RECORDS = sorted(page.RESULTS.glob("*.json"))


def test_a_case_is_learnt_recorded_and_tried_on_another_model(tmp_path: Path) -> None:
    data = load_data("digits", n=120)
    case = Case("patch", "8", {"steps": 5}, 0.99)
    clf = load_model("zoo:digits")
    run = measure(case, clf, data, {}, 60)
    record = record_of(run, case, clf)
    assert (record["train"], record["n"], record["target"], record["holds"]) == (60, 60, 8, False)
    assert record["area"] <= 0.1
    path = tmp_path / "case.json"
    run.change.save(path.with_suffix(".safetensors"))
    write_json(path, record)
    told = transfer(path, case, data, {"zoo:digits-at": load_model("zoo:digits-at")}, 60)
    [row] = told["transfer"]
    assert row["model"] == "zoo:digits-at"
    assert 0 <= row["control"]["success_rate"] <= 1
    again = transfer(path, case, data, {"same": clf}, 60)["transfer"][0]
    assert again["success_rate"] == record["success_rate"], "a stored patch is the one that was measured"


def test_every_case_can_be_built() -> None:
    data = load_data("digits", n=2)
    for case in CASES.values():
        assert isinstance(case.build(data), get(case.attack))


def test_the_page_says_what_the_records_say() -> None:
    text = page.README.read_text(encoding="utf-8")
    assert page.PAGE.fill(text) == text
    assert page.FIGURE.exists() == any("grid" in read_json(path) for path in RECORDS)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_consistent_and_names_its_conditions(path: Path) -> None:
    record = read_json(path)
    case = CASES[path.stem]
    assert record["attack"] == case.attack
    for part in (record, record["control"], *record["transfer"]):
        assert part["success_rate"] == pytest.approx(part["fooled"] / part["attempted"])
        assert part["interval"] == pytest.approx(clopper_pearson(part["fooled"], part["attempted"]))
    assert record["holds"] == (None if case.floor is None else record["success_rate"] > case.floor)
    assert record["train"] == 500
    assert record["attempted"] >= 1000
    for key in ("commit", "seed", "versions", "device", "date", "model_digest", "threat"):
        assert record[key] not in (None, ""), key
    if case.attack == "patch":
        patch = TrainedPatch.load(path.with_suffix(".safetensors"))
        assert patch.area == record["area"] == pytest.approx(0.1, rel=1e-9), "a tenth, but for rounding"
        assert (patch.ranges.rotation, patch.ranges.smallest, patch.ranges.largest) == (20.0, 0.8, 1.2)
        assert path.with_suffix(".png").exists()


def test_what_must_be_shown_is_shown_or_spoken_of() -> None:
    held = {path.stem: read_json(path)["holds"] for path in RECORDS}
    for name in ("patch", "uap", "patch-to-automobile", "patch-to-bird"):
        assert held[name], name
    short = {name for name, holds in held.items() if holds is False}
    said = page.README.read_text(encoding="utf-8").partition(page.PAGE.begin)[0]
    assert {name for name in short if f"`{name}`" not in said} == set(), "a floor that is missed is spoken of"
