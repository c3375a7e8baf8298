"""The experiment on detectors: its records, its page and its claims agree."""

from __future__ import annotations

from typing import Any

import pytest

from robust.cli.detect import make_detectors
from robust.defenses import REGISTRY, get
from robust.detection import AWARE, verdict
from robust.experiments.detection import measure, page

RECORDS = page.records()
EVERY = pytest.mark.parametrize("record", RECORDS.values(), ids=list(RECORDS))


def test_the_page_says_what_the_records_say() -> None:
    text = page.README.read_text(encoding="utf-8")
    assert page.PAGE.fill(text) == text


@EVERY
def test_the_figure_is_the_record_s(record: dict[str, Any]) -> None:
    assert (page.FOLDER / f"{record['subject']}.svg").read_bytes() == page.drawn(record)


@EVERY
def test_every_detector_is_measured_with_the_parameters_that_the_code_has(record: dict[str, Any]) -> None:
    subject = measure.SUBJECTS[record["subject"]]
    asked = {item.name: item for item in make_detectors(subject.detectors, subject.eps).values()}
    assert set(asked) == {name for name in REGISTRY if get(name).kind == "detector"}
    assert {row["name"] for row in record["detectors"]} <= set(asked)
    for row in record["detectors"]:
        assert row["detector"]["parameters"] == asked[row["name"]].describe()["parameters"]
        assert row["detector"]["held_out"] == record["samples"]["held_out"] >= 999
    assert record["attacks"] == {name: dict(settings) for name, settings in subject.attacks.items()}


@EVERY
def test_the_record_adds_up(record: dict[str, Any]) -> None:
    n = record["samples"]["test"]
    for row in record["detectors"]:
        clean = row["clean_flagged"]
        assert clean["of"] == n
        # Threshold and count are both random; five deviations of the two together.
        rate = row["detector"]["fpr"]
        spread = (rate * (1 - rate) * (1 / n + 1 / record["samples"]["held_out"])) ** 0.5
        if not row["detector"]["stateful"]:
            assert abs(clean["fraction"] - rate) < 5 * spread
        for told in row["attacks"].values():
            assert told["success"]["count"] <= told["broken"] <= told["n"] == told["success"]["of"]
            assert told["curve"] == sorted(told["curve"])
        if not row["detector"]["stateful"]:
            assert set(row["attacks"]) == set(record["attacks"])
            assert row["verdict"] == verdict(row["attacks"])
            for told in row["attacks"].values():
                assert told["flagged"]["count"] + told["success"]["count"] == told["broken"]
                low, high = told["interval"]
                assert low <= told["auc"] <= high


@EVERY
def test_an_attack_that_knows_a_detector_gets_past_it_no_less_often_than_pgd(record: dict[str, Any]) -> None:
    for row in record["detectors"]:
        if not row["detector"]["stateful"]:
            known, blind = (row["attacks"][name]["success"]["fraction"] for name in (AWARE, "pgd"))
            assert known >= blind, row["name"]
