"""The experiment on transforms: its record, its page and its claims agree, and its code runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from robust import load_data, load_model
from robust.cli.main import parse, run
from robust.cli.settings import make_defenses
from robust.defenses import REGISTRY, get
from robust.digest import read_json
from robust.experiments.defenses import matrix, measure, page


@pytest.fixture(scope="module")
def cases() -> dict[str, dict[str, Any]]:
    return dict(read_json(page.RECORD)["cases"])


def test_the_page_says_what_the_records_say() -> None:
    text = page.README.read_text(encoding="utf-8")
    assert page.PAGE.fill(text) == text
    assert page.MATRIX.fill(text) == text


def test_every_transform_is_measured_with_the_parameters_that_the_code_has(
    cases: dict[str, dict[str, Any]],
) -> None:
    assert set(cases) == set(measure.CASES)
    assert {name for name in REGISTRY if get(name).kind == "transform"} <= set(cases)
    for name, case in cases.items():
        assert case["specs"] == measure.CASES[name]
        assert case["defenses"] == [item.describe() for item in make_defenses(measure.CASES[name])]


def test_adaptive_attacks_leave_under_three_percent_of_every_transform(
    cases: dict[str, dict[str, Any]],
) -> None:
    assert {name: page.holds(case) for name, case in cases.items()} == dict.fromkeys(measure.CASES, True)
    for case in cases.values():
        assert case["n"] >= 100
        assert case["threat"] == {"norm": "linf", "eps": [pytest.approx(8 / 255)]}
        randomised = any(item["randomised"] for item in case["defenses"])
        assert case["draws"] == (25 if randomised else 1)
        assert all(stage.get("copies") == 20 for stage in case["stages"]) == randomised
    assert len({case["model"] for case in cases.values()}) == 1


def test_the_record_adds_up(cases: dict[str, dict[str, Any]]) -> None:
    for case in cases.values():
        beside, n = case["non_adaptive"], case["n"]
        right = round(case["clean_accuracy"] * n)
        unaware = sum(count for name, count in case["broken_by"].items() if name.startswith("non-adaptive"))
        assert case["robust_accuracy"] == (right - sum(case["broken_by"].values())) / n
        assert case["adaptive_accuracy"] == pytest.approx(case["robust_accuracy"] + unaware / n)
        assert beside["overstated"] == pytest.approx(beside["claimed"] - case["robust_accuracy"])


def test_where_rounding_hides_the_gradient_autograd_would_have_claimed_most_of_the_clean_accuracy(
    cases: dict[str, dict[str, Any]],
) -> None:
    for name in ("bit-depth", "jpeg"):
        assert cases[name]["non_adaptive"]["naive"] >= 0.8 * cases[name]["clean_accuracy"]


def test_the_words_about_replays_and_randomness_are_the_record_s(cases: dict[str, dict[str, Any]]) -> None:
    assert cases["mean-smooth"]["non_adaptive"]["replay"] == pytest.approx(0.2, abs=0.02)
    assert cases["jpeg"]["non_adaptive"]["replay"] > cases["mean-smooth"]["non_adaptive"]["replay"]
    for case in cases.values():
        if any(item["randomised"] for item in case["defenses"]):
            assert case["non_adaptive"]["overstated"] <= 0.1


def test_a_case_is_measured_as_the_record_has_it() -> None:
    clf, data = load_model("zoo:digits", device="cpu"), load_data("digits", n=4)
    found = measure.measure(clf, data, ["bit-depth:bits=3"])
    assert found["n"] == 4
    assert found["specs"] == ["bit-depth:bits=3"]
    assert found["adaptive_accuracy"] <= found["clean_accuracy"]
    assert found["model"] == clf.digest()


def test_the_matrix_has_every_transform_as_the_record_of_transforms_has_it() -> None:
    words = matrix.command(Path("run"), Path("w.safetensors"), ["at=zoo:resnet20@at.safetensors"])
    given = parse(words)
    assert given["defense"] == ["+".join(specs) for specs in measure.CASES.values()]
    transforms = {name for name in REGISTRY if get(name).kind == "transform"}
    assert {spec.partition(":")[0] for text in given["defense"] for spec in text.split("+")} == transforms
    assert given["suite"] == ["quick", "standard", "patch", "transfer"]
    assert given["models"][1:] == ["at=zoo:resnet20@at.safetensors"]
    assert given["eps"] == "8/255"


def test_the_page_tells_the_matrix_of_a_run_and_that_there_is_none_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "matrix.json"
    monkeypatch.setattr(page, "MATRIX_RECORD", record)
    monkeypatch.setattr(page, "FOLDER", tmp_path)
    assert page.matrix_section().startswith("No record yet")
    words = ["matrix", "zoo:digits", "--defense", "bit-depth:bits=2", "--suite", "fgsm", "--n", "4"]
    assert run([*words, "--out", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    kept = matrix.keep(tmp_path / "run", record, "some digits")
    assert "command" not in kept
    assert str(tmp_path) not in record.read_text()
    told = page.matrix_section()
    assert "| digits + bit-depth:bits=2 |" in told
    assert "some digits: 4 samples" in told
    assert "points over fgsm" in told
    page.draw_matrix()
    assert (tmp_path / page.MATRIX_FIGURE).read_text().startswith("<?xml")
