"""The attacks' Triton kernels without a GPU: in Triton's interpreter against float64, and compiled for one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels' tests need triton")


def child(root: Path, what: str, **variables: str) -> dict[str, Any]:
    """The report of `attacks_child` in a process of its own."""
    command = [sys.executable, "-m", "tests.cuda_ops.attacks_child", what]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.fixture(scope="module")
def report(root: Path) -> dict[str, Any]:
    """What the interpreter finds."""
    return child(root, "interpret", TRITON_INTERPRET="1", ROBUST_OPS="triton")


def test_every_kernel_is_the_reference_in_float64(report: dict[str, Any]) -> None:
    assert report["wrong"] == {}


def test_the_linf_steps_are_the_reference_bit_for_bit(report: dict[str, Any]) -> None:
    assert report["inexact"] == []


def test_rows_too_long_for_the_registers_are_the_reference_too(report: dict[str, Any]) -> None:
    assert report["wrong long"] == {}


def test_losses_have_the_reference_s_value_where_logits_are_not_finite(report: dict[str, Any]) -> None:
    assert report["values"] == []


def test_images_keep_their_layout(report: dict[str, Any]) -> None:
    assert report["layouts"] is True


def test_a_batch_without_rows_passes(report: dict[str, Any]) -> None:
    assert report["empty"] is True


def test_no_gradient_flows_through_a_kernel(report: dict[str, Any]) -> None:
    assert report["detached"] is True


def test_the_operators_keep_the_rules_of_torch_library(report: dict[str, Any]) -> None:
    assert report["checks"] == {}


def test_torch_compile_keeps_each_operator_in_one_graph(report: dict[str, Any]) -> None:
    assert report["graphs"] == {
        "step_linf": ["robust.step_linf"],
        "apgd_l1": ["robust.apgd_l1"],
        "loss dlr": ["robust.loss_gradient"],
    }


def test_every_launch_compiles_for_a_gpu(root: Path, tmp_path: Path) -> None:
    sizes = child(root, "compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0", ROBUST_OPS="")[
        "sizes"
    ]
    # A step plain, masked and with APGD's term: in linf, and in l2 and l1 for both kinds of rows; momentum; losses.
    assert len(sizes) == 3 + 2 * 2 * 3 + 2 + 8
    assert min(sizes.values()) > 1000
