"""The recorded verdicts agree with what the cards and the README claim, and with themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robust.experiments.verdicts.record import make_record
from robust.experiments.verdicts.reference import compare

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "experiments" / "verdicts" / "results").glob("*.json"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_record_is_consistent_and_names_its_conditions(path: Path) -> None:
    record = json.loads(path.read_text())
    results, n = record["results"], record["data"]["n"]
    assert results["clean_accuracy"] == pytest.approx(results["correct"] / n)
    assert results["robust_accuracy"] == pytest.approx(results["robust"] / n)
    broken = sum(stage["broken"] for stage in record["stages"])
    assert results["correct"] - broken == results["robust"]
    for key in ("commit", "seed", "versions", "device", "finished", "threat", "suite"):
        assert record[key] not in (None, ""), key
    assert f"`{path.stem}`" in (ROOT / "experiments" / "verdicts" / "README.md").read_text()


def test_undefended_resnet20_keeps_nothing_at_8_255() -> None:
    record = json.loads((ROOT / "experiments/verdicts/results/cifar10-resnet20-linf-8.json").read_text())
    assert record["data"]["n"] == 1000
    assert record["threat"] == {"norm": "linf", "eps": [8 / 255]}
    assert record["suite"]["name"] == "standard"
    assert abs(record["results"]["clean_accuracy"] - 0.912) <= 0.003
    assert record["results"]["robust_accuracy"] == 0.0


def test_readme_quotes_the_records() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    for stem, start in (
        ("digits-linf-0.2", "| `zoo:digits`"),
        ("cifar10-resnet20-linf-8", "| a CIFAR ResNet-20"),
    ):
        record = json.loads((ROOT / "experiments/verdicts/results" / f"{stem}.json").read_text())
        (line,) = (line for line in lines if line.startswith(start))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        results = record["results"]
        assert cells[3:] == [
            record["suite"]["name"],
            f"{results['clean_accuracy']:.1%}".replace("%", " %"),
            f"{results['robust_accuracy']:.1%}".replace("%", " %"),
        ]
        assert f"{record['data']['n']:,}" in cells[1]


def test_comparison_names_the_samples_on_which_two_verdicts_disagree() -> None:
    record = {"correct": [0, 1, 2, 3], "parts": {"a": {"broken": [1]}, "b": {"broken": [1, 2]}}}
    assert compare(record, [True, False, True, False, False]) == {"missed": [2], "beyond": [3]}


def test_record_of_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    from robust.errors import RunError

    with pytest.raises(RunError, match=r"manifest\.json"):
        make_record(tmp_path, "0")
