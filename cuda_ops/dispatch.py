"""Which implementation of a fused operation runs: by device, or as ``ROBUST_OPS=reference|triton|cuda`` says.

An operation is a public function with one meaning (`robust.cuda_ops.reference`) and up to two fused implementations.
On a CPU the meaning itself runs, so that `torch.compile` sees plain PyTorch; a fused one is an operator of
`torch.library` with a fake implementation, so that `torch.compile` and CUDA graphs keep it.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal

from torch import Tensor

Backend = Literal["reference", "triton", "cuda"]
VARIABLE = "ROBUST_OPS"


class BackendError(RuntimeError):
    """The implementation that was asked for cannot run here."""


_TRITON = importlib.util.find_spec("triton") is not None


def has_triton() -> bool:
    """Whether the package triton is there; it is not imported."""
    return _TRITON


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, which takes CPU tensors (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend(tensor: Tensor, default: Backend = "triton") -> Backend:
    """The implementation for work on `tensor`.

    Args:
        tensor: where the work is: a CPU tensor always means "reference", unless one is forced.
        default: what a GPU uses for this operation when nothing is forced: the one that was measured faster.

    Raises:
        BackendError: `ROBUST_OPS` names an implementation that is unknown, or that cannot run on this device.
    """
    forced = os.environ.get(VARIABLE, "")
    if forced not in ("", "reference", "triton", "cuda"):
        raise BackendError(f"{VARIABLE}={forced} is unknown; use reference, triton or cuda")
    if forced == "reference":
        return "reference"
    if forced == "triton":
        if not has_triton():
            raise BackendError(f"{VARIABLE}=triton, but the package triton is not installed")
        if not tensor.is_cuda and not interpreted():
            raise BackendError(f"{VARIABLE}=triton needs a GPU, or TRITON_INTERPRET=1 on a CPU")
        return "triton"
    if forced == "cuda":
        if not tensor.is_cuda:
            raise BackendError(f"{VARIABLE}=cuda needs a GPU")
        return "cuda"
    if not tensor.is_cuda:
        return "reference"
    if default == "triton" and not has_triton():
        return "reference"
    return default
