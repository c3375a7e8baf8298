"""The benchmark of private steps: ours must clip as a loop does before it has a ratio; parts bound the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robust.experiments.benchmarks import private, tables
from robust.experiments.benchmarks.harness import RESULTS, Work, WrongResult
from robust.experiments.benchmarks.private import OURS, PLAIN, VMAP, Private, Subject, small_cnn
from robust.experiments.benchmarks.private_memory import FORGET, peak


def nothing() -> Any:
    """This benchmark has its own subjects."""
    raise AssertionError


def quick(monkeypatch: pytest.MonkeyPatch) -> Work:
    """A small batch, one round."""
    monkeypatch.setitem(private.SUBJECTS, "cnn", Subject(small_cnn, (1, 28, 28), 8))
    return Work(nothing, repeats=1, only=("opacus-hooks",), say=lambda line: None)


def test_a_record_compares_ours_with_a_plain_step_and_with_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Private(subjects=("cnn",)).record(quick(monkeypatch))
    wanted = {f"cnn, {name}" for name in (PLAIN, OURS, VMAP)}
    assert wanted <= set(record["contestants"])
    assert record["costs"][f"cnn, {OURS}"]["median"] > 0.5
    assert record["contestants"][f"cnn, {OURS}"]["error"] < 1e-5
    if not record["skipped"]:
        assert record["ratios"][f"cnn, {OURS}"]["against"] == "cnn, opacus-hooks"
    heads, rows = Private().table(record)
    assert all(len(row) == len(heads) for row in rows)


def test_a_sum_that_is_not_clipped_so_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = private.loop_sum

    def other(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return 1.001 * exact(model, x, y)

    monkeypatch.setattr(private, "loop_sum", other)
    with pytest.raises(WrongResult, match="clipped sum"):
        Private(subjects=("cnn",)).record(quick(monkeypatch))


@pytest.mark.skipif(not FORGET.exists(), reason="peak memory is read from /proc, which is not here")
def test_parts_bound_the_memory_by_that_of_a_plain_step() -> None:
    assert peak("resnet20", 48, 12) < peak("resnet20", 48, 0)


@pytest.mark.parametrize("stem", [path.stem for path in sorted(RESULTS.glob("privacy*.json"))])
def test_the_record_holds_what_the_toolkit_claims(stem: str) -> None:
    record = tables.read_records()[stem]
    for name, most in (("cnn", 1.45), ("resnet20", 1.9)):
        assert record["costs"][f"{name}, {OURS}"]["median"] <= most
        assert record["ratios"][f"{name}, {OURS}"]["median"] >= 1.25
    assert torch.isfinite(torch.tensor(record["contestants"][f"cnn, {OURS}"]["error"]))
