"""The kernels of `cases_defences` in Triton's interpreter, in a process of their own, against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton's interpreter needs the package triton")
ROOT = Path(__file__).resolve().parents[2]


def child(module: str, **environment: str) -> dict[str, Any]:
    """What a process of its own prints last."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.cuda_ops.{module}"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What the child process with the interpreter found, see `defences_child`."""
    return child("defences_child", TRITON_INTERPRET="1", ROBUST_OPS="triton")


def test_every_kernel_compiles_for_a_gpu_that_is_not_here(tmp_path: Path) -> None:
    variants = child("hopper_child", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0", ROBUST_OPS="")
    launched = (
        "noise vote blur resize resize_adjoint squares weighted update trimmed quantise dequantise sparsify"
    )
    assert set(variants) == {f"_{name}" for name in launched.split()}
    assert min(variants.values()) > 1


def test_every_kernel_agrees_with_the_float64_reference_at_odd_shapes(report: dict[str, Any]) -> None:
    assert report["wrong"] == {}
    assert report["compared"] > 75


def test_the_comparison_sees_a_wrong_kernel(report: dict[str, Any]) -> None:
    assert report["spoilt"] == {"1e-05": True, "nan": True}


def test_a_kernel_s_words_are_the_reference_s_bit_for_bit(report: dict[str, Any]) -> None:
    assert report["integers"] is True


def test_half_precision_is_rounded_once(report: dict[str, Any]) -> None:
    assert len(report["half"]) == 8
    assert {name: error for name, error in report["half"].items() if error > 1} == {}


def test_sparsified_half_numbers_lose_nothing(report: dict[str, Any]) -> None:
    assert report["sparse"] is True


def test_torch_compile_keeps_the_operators_in_one_graph(report: dict[str, Any]) -> None:
    expected = {name: [f"robust.{name}"] for name in ("noise_batch", "separable_blur", "quantise")}
    assert report["graphs"] == expected


def test_every_operator_passes_torch_s_own_checks(report: dict[str, Any]) -> None:
    assert len(report["checks"]) == 13
    assert {name: text for name, text in report["checks"].items() if text} == {}


def test_gradients_of_every_order_are_the_reference_s(report: dict[str, Any]) -> None:
    assert len(report["orders"]) == 4
    assert {name: gap for name, gap in report["orders"].items() if not gap < 1e-5} == {}
