"""The CUDA C++ kernels without a GPU: built by nvcc, and run on the CPU with emulated threads."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from robust.cuda_ops import cuda, losses, steps
from robust.cuda_ops.cases_attacks import CASES, LOSSES
from robust.cuda_ops.dispatch import BackendError
from tests.cuda_ops.attack_inputs import CLASSES, SHAPES, inexact, odd_logits, wrong

BUILD = "import json; from robust.cuda_ops import cuda; path = cuda.build(); cuda.bind(path); print(json.dumps(path))"


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels compiled for the CPU, each CUDA thread a fiber."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here: it compiles the CUDA kernels for emulated threads")
    library = tmp_path_factory.mktemp("emulated") / "attacks.so"
    header = Path(__file__).with_name("emulate.h")
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, "-include", str(header), "-x", "c++", *cuda.SOURCES, "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return cuda.bind(str(library))


@pytest.fixture
def forced(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions run the emulated kernels."""
    monkeypatch.setattr(cuda, "library", lambda: emulated)
    for module in (steps, losses):
        monkeypatch.setattr(module, "backend", lambda *_: "cuda")


# A row of 9,001 does not fit in a block's registers, one of 300 is read 16 bytes at a time.
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_is_the_reference_in_float64(name: str, forced: None) -> None:
    shapes = CLASSES if name in LOSSES else (*SHAPES, (3, 300), (2, 9001))
    assert wrong({name: shapes}) == {}


def test_the_linf_steps_are_the_reference_bit_for_bit(forced: None) -> None:
    assert inexact() == []


@pytest.mark.parametrize("name", LOSSES)
def test_losses_have_the_reference_s_value_where_logits_are_not_finite(name: str, forced: None) -> None:
    logits, y, targets, clean = odd_logits()
    loss = name.removeprefix("loss ").removesuffix(", targeted")
    aims = targets if "targeted" in name else None
    found, gradient = CASES[name].operation(loss, logits, y, aims, clean)
    expected, closed = CASES[name].reference(loss, logits, y, aims, clean)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if "dlr" not in name:  # its last row's denominator takes either of two equal logits
        torch.testing.assert_close(gradient[-1], closed[-1], rtol=1e-5, atol=1e-6, equal_nan=True)


def test_the_library_builds_and_has_every_function(root: Path, tmp_path: Path) -> None:
    if shutil.which("nvcc") is None or shutil.which("ninja") is None:
        pytest.skip("no nvcc or ninja here: they build the CUDA kernels")
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path), "TORCH_CUDA_ARCH_LIST": "9.0"}
    done = subprocess.run(
        [sys.executable, "-c", BUILD], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(json.loads(done.stdout.splitlines()[-1])).is_relative_to(tmp_path)


def test_a_build_that_fails_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with pytest.raises(BackendError, match="could not be built: no nvcc was found") as error:
        cuda.build()
    assert "\n" not in str(error.value)
    said = (
        "Error building extension 'robust_attacks': [1/2] nvcc\nattacks.cu(3): error: expected a ;\nninja: no"
    )
    assert cuda._reason(said) == "attacks.cu(3): error: expected a ;"
