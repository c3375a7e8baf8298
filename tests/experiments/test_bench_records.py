"""Benchmarks of fused operations, the tables made from records, and the script for a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robust.cuda_ops.case import Case
from robust.digest import read_json, write_json
from robust.errors import RunError
from robust.experiments.benchmarks import harness, kernels, tables
from robust.experiments.benchmarks.harness import WrongResult
from tests.experiments.bench_parts import CPU, copied, small, work

ROOT = Path(__file__).resolve().parents[2]


# -- fused operations -------------------------------------------------------------------------------------------


def double(values: Tensor) -> Tensor:
    """An operation for tests."""
    return values * 2


def case(operation: Any, tolerance: float = 1e-6) -> Case:
    """A case of `double`."""

    def make(rows: int, elements: int, seed: int, device: torch.device) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"values": torch.rand(rows, elements, generator=generator).to(device)}

    return Case(operation, double, make, lambda a: 8 * a["values"].numel(), tolerance=tolerance)


def timed_cases(**cases: Case) -> kernels.Kernels:
    """The benchmark of these cases, tiny."""
    return kernels.Kernels(cases=cases, odd=((1, 1), (3, 5)), large=(2, 8), aim=1e-6)


def test_kernels_checks_and_then_times_beside_a_copy() -> None:
    record = copied(timed_cases(double=case(double), exact=case(double, 0.0)).record(work(repeats=2)))
    one = record["cases"]["double"]
    assert one["errors"]["reference"]["error"] <= 1e-6
    assert len(one["seconds"]["reference"]) == len(one["seconds"]["copy"]) == 2
    pairs = [a / b for a, b in zip(one["seconds"]["copy"], one["seconds"]["reference"], strict=True)]
    assert one["bandwidth"]["reference"] == pytest.approx(sum(pairs) / 2)
    assert record["cases"]["exact"]["errors"]["reference"]["error"] == 0.0


@pytest.mark.parametrize(
    ("operation", "tolerance"),
    [
        (lambda values: values * 2.001, 1e-6),
        (lambda values: values * (2 + 1e-6), 0.0),
        (lambda values: values.flatten() * 2, 1e-6),
        (lambda values: values * float("nan"), 1e-6),
    ],
)
def test_kernels_refuses_an_operation_that_is_wrong(operation: Any, tolerance: float) -> None:
    with pytest.raises(WrongResult, match="wrong is wrong: reference is off by"):
        timed_cases(right=case(double), wrong=case(operation, tolerance)).record(work())


def test_what_eager_pytorch_loses_itself_is_no_fault() -> None:
    errors = kernels.check_case(case(double, 1e-300), CPU, ((3, 5),), ())
    assert errors["reference"]["error"] <= errors["reference"]["limit"]


# -- tables -----------------------------------------------------------------------------------------------------


def test_a_record_reads_back_into_the_table(tmp_path: Path) -> None:
    benches = (small(), timed_cases(double=case(double)))
    for bench in benches:
        record = bench.record(work(repeats=2, modes=("original",)), {"model": "zoo:digits", "data": "digits"})
        write_json(tmp_path / f"{bench.name}-cpu.json", record)
    text = tables.section(tables.read_records(tmp_path))
    first = read_json(tmp_path / "attacks-cpu.json")
    ratio = first["ratios"]["original"]
    assert f"{ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f})" in text
    assert "`attacks-cpu`: zoo:digits, digits, 4 samples, linf 76.5/255" in text
    assert "| strong |" in text
    assert "| double | reference |" in text
    assert text.count("no record yet") == 7  # all others


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"benchmark": "attacks"}')
    with pytest.raises(RunError, match="no record of a benchmark"):
        tables.read_records(tmp_path)


def test_the_readme_shows_the_records_there_are() -> None:
    text = tables.README.read_text(encoding="utf-8")
    assert tables.PAGE.fill(text) == text
    with pytest.raises(RunError, match="marks"):
        tables.PAGE.fill("no marks")


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_stored_record_names_its_conditions_and_ran_in_turn(path: Path) -> None:
    record = read_json(path)
    for key in ("commit", "date", "device", "versions", "settings"):
        assert record[key], key
    order = record.get("order", [])
    for one, following in itertools.pairwise(order):
        assert one != following or len(set(order)) == 1


# -- the GPU's script -------------------------------------------------------------------------------------------

BLOCK = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"typer", "rich", "safetensors", "sklearn", "scipy", "torchvision", "jinja2", "PIL"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""


def test_the_script_for_a_gpu_runs_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    command = [sys.executable, "experiments/benchmarks/gpu.py", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--device", "cpu", "--quick"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = read_json(tmp_path / "out" / "gpu.json")
    assert "torchvision is not installed" in record["pgd_resnet50"]["skipped"]
    assert set(record["pgd_resnet20"]["engine_per_captured"]) == {"float32", "bfloat16"}
    assert record["suite"]["ratio"] > 0
    for name, own in record["kernels"]["cases"].items():
        assert own["failures"] == {}, name
        assert own["reference"]["error"] <= own["reference"]["limit"]


def test_a_part_that_fails_leaves_its_reason_and_the_others_their_numbers(tmp_path: Path) -> None:
    from robust.experiments.benchmarks.gpu import Run

    run = Run(tmp_path, CPU, True, None, 0.0)

    def fails(run: Run) -> dict[str, Any]:
        raise ValueError("a bad kernel\nand its trace")

    run.part("first", fails)
    run.part("second", lambda run: {"value": float("inf")})
    record = read_json(tmp_path / "gpu.json")
    assert record["first"]["failed"].startswith("ValueError: a bad kernel (test_bench_records.py:")
    assert record["second"]["value"] == "inf"
    late = Run(tmp_path, CPU, False, None, 0.0)
    late.part("third", lambda run: {})
    assert "no time was left" in late.record["third"]["failed"]


def test_weights_come_from_numpy_or_torch(tmp_path: Path) -> None:
    import numpy as np

    from robust.errors import RobustError
    from robust.experiments.benchmarks.gpu import read_state

    state = {"a.weight": torch.arange(3.0)}
    np.savez(tmp_path / "w.npz", **{name: value.numpy() for name, value in state.items()})
    torch.save(state, tmp_path / "w.pt")
    for name in ("w.npz", "w.pt"):
        assert torch.equal(read_state(tmp_path / name)["a.weight"], state["a.weight"])
    with pytest.raises(RobustError, match="safetensors"):
        read_state(tmp_path / "w.safetensors")
