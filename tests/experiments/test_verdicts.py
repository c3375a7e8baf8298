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


COMPARISONS = sorted((ROOT / "experiments" / "verdicts" / "comparisons").glob("*.json"))
PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")


def test_two_models_are_compared_with_autoattack_on_300_images_each() -> None:
    assert [path.stem for path in COMPARISONS] == ["cifar10-resnet20-linf-0.5", "mnist-at-linf-0.3"]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_verdict_misses_at_most_one_sample_and_no_component_is_weaker(path: Path) -> None:
    record = json.loads(path.read_text())
    ours, reference = record["ours"], record["reference"]
    assert record["data"]["n"] == 300
    assert record["correct"] == reference["correct"]
    assert sum(stage["broken"] for stage in ours["stages"]) == len(ours["broken"])
    union = {i for part in reference["parts"].values() for i in part["broken"]}
    assert record["missed"] == sorted(union - set(ours["broken"]))
    assert record["beyond"] == sorted(set(ours["broken"]) - union)
    assert len(record["missed"]) <= 1
    for name in PARTS:
        alone = ours["alone"][name]["broken"]
        assert len(alone) >= len(reference["parts"][name]["broken"]) - 2, name
        assert set(alone) <= union | set(ours["broken"])


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_table_quotes_the_comparison(path: Path) -> None:
    record = json.loads(path.read_text())
    lines = (ROOT / "experiments/verdicts/README.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"| `{path.stem}`"))
    parts = record["reference"]["parts"]
    ours = record["ours"]
    union = {i for part in parts.values() for i in part["broken"]}
    cells = [f"{len(ours['alone'][name]['broken'])} / {len(parts[name]['broken'])}" for name in PARTS]
    cells += [f"{len(ours['broken'])} / {len(union)}", str(len(record["missed"])), str(len(record["beyond"]))]
    assert [cell.strip() for cell in line.strip("|").split("|")][2:] == cells


def test_robust_mnist_model_keeps_four_fifths_under_the_standard_suite() -> None:
    record = json.loads((ROOT / "experiments/verdicts/comparisons/mnist-at-linf-0.3.json").read_text())
    assert record["eps"] == 0.3
    assert (record["correct"] - len(record["ours"]["broken"])) / 300 >= 0.8


def test_comparison_names_the_samples_on_which_two_verdicts_disagree() -> None:
    record = {"correct": [0, 1, 2, 3], "parts": {"a": {"broken": [1]}, "b": {"broken": [1, 2]}}}
    assert compare(record, [True, False, True, False, False]) == {"missed": [2], "beyond": [3]}


def test_record_of_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    from robust.errors import RunError

    with pytest.raises(RunError, match=r"manifest\.json"):
        make_record(tmp_path, "0")
