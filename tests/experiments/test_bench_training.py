"""The benchmark of training steps: ours must do the work before it has a ratio."""

from __future__ import annotations

import pytest
import torch

from robust.experiments.benchmarks import tables, training
from robust.experiments.benchmarks.harness import RESULTS, WrongResult
from robust.experiments.benchmarks.training import TrainingStep
from tests.experiments.bench_parts import work


def test_a_record_compares_ours_with_a_plain_loop_and_with_the_bare_gradients() -> None:
    record = TrainingStep(libraries={}).record(work(repeats=1, modes=("float32",)))
    assert set(record["contestants"]) == {"float32", "bare gradients, float32", "float32 loop"}
    assert record["ratios"]["float32"]["against"] == "float32 loop"
    assert record["overhead"]["float32"]["median"] > 0.5
    heads, rows = TrainingStep().table(record)
    assert all(len(row) == len(heads) for row in rows)


def test_an_inner_attack_that_does_not_climb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "inner_points", lambda attack, clf, x, y, index, seed: x)
    with pytest.raises(WrongResult, match="float32: its points' loss is"):
        TrainingStep(libraries={}).record(work(repeats=1, modes=("float32",)))


@pytest.mark.parametrize("stem", [path.stem for path in sorted(RESULTS.glob("training*.json"))])
def test_the_record_holds_what_the_toolkit_claims(stem: str) -> None:
    record = tables.read_records()[stem]
    assert record["overhead"]["bfloat16"]["median"] <= 1.15
    assert record["against"]["float32 loop"]["bfloat16"]["median"] >= 1.8
    assert record["against"]["art"]["bfloat16"]["median"] >= 2.5
    assert record["attack"]["steps"] == 7
    assert torch.isfinite(torch.tensor(record["contestants"]["bfloat16"]["adversarial_loss"]))
