"""The experiment on smoothing: its page, its record if there is one, and its code agree."""

from __future__ import annotations

from pathlib import Path

import pytest
from scipy import stats

from robust import load_data, load_model
from robust.digest import read_json, write_json
from robust.experiments.certified import measure, page


def test_the_page_says_what_the_record_says() -> None:
    text = page.README.read_text(encoding="utf-8")
    assert page.PAGE.fill(text) == text


def test_it_measures_what_the_page_tells(tmp_path: Path) -> None:
    clf, data = load_model("zoo:digits", device="cpu"), load_data("digits", n=4)
    record = measure.measure(clf, data, tmp_path, 300)
    write_json(tmp_path / "smoothing.json", record)
    assert measure.measure(clf, data, tmp_path, 300)["fixed"] == record["fixed"], "a finished part is kept"
    found = measure.compare(record["fixed"]["samples"], record["sequential"]["samples"])
    assert found["votes"][0] == 4 * 400
    assert found["share"] <= 1
    assert "| sequential |" in page.tell(read_json(tmp_path / "smoothing.json"))


def test_scipy_repeats_every_radius_of_the_record_and_sequential_votes_keep_their_word() -> None:
    if not page.RECORD.exists():
        pytest.skip("experiments/certified has no record yet")
    record = read_json(page.RECORD)
    settings = record["settings"]
    for sample in record["fixed"]["samples"]:
        k = sample["votes"].get(str(sample["chosen"]), 0)
        lower = stats.beta.ppf(settings["alpha"], k, sample["n"] - k + 1) if k else 0.0
        assert sample["n"] == settings["n"] == sum(sample["votes"].values())
        expected = settings["sigma"] * stats.norm.ppf(lower) if lower > 0.5 else 0.0
        assert sample["radius"] == pytest.approx(expected, rel=1e-9)
    found = measure.compare(record["fixed"]["samples"], record["sequential"]["samples"])
    assert found["share"] <= 1 / 3
    assert all(lost <= 0.02 * len(record["fixed"]["samples"]) for lost in found["lost"].values())
