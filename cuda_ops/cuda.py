"""The CUDA C++ kernels of the attacks: built on first use, called through plain C functions.

`torch.utils.cpp_extension` compiles them for the GPUs that are there and keeps the library in its own folder
(TORCH_EXTENSIONS_DIR). The sources need none of torch's headers, which makes the build seconds instead of minutes.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import subprocess
import warnings
from pathlib import Path

import torch
from torch import Tensor

from robust.cuda_ops.dispatch import BackendError
from robust.cuda_ops.reference.losses import LOSSES

SOURCES = tuple(str(Path(__file__).parent / "csrc" / name) for name in ("attacks.cu", "losses.cu"))
_NORMS = {"linf": 0, "l1": 1, "l2": 2}
_WHOLE, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES = {
    "robust_step": [ctypes.c_int, _WHOLE, _WHOLE, _FLOAT, _FLOAT, *[_POINTER] * 11],
    "robust_momentum": [_WHOLE, _WHOLE, _FLOAT, *[_POINTER] * 4],
    "robust_loss": [ctypes.c_int, _WHOLE, ctypes.c_int, *[_POINTER] * 7],
}


def build() -> str:
    """Compiles the kernels where the folder has no current library, and loads it.

    Returns:
        The library's path.

    Raises:
        BackendError: there is no compiler or it failed, or neither a GPU nor TORCH_CUDA_ARCH_LIST says for what.
    """
    if not torch.cuda.is_available() and "TORCH_CUDA_ARCH_LIST" not in os.environ:
        raise BackendError("the CUDA kernels are built for a GPU: there is none, and no TORCH_CUDA_ARCH_LIST")
    try:
        from torch.utils import cpp_extension

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the GPUs that are there are the ones that are meant
            path = cpp_extension.load(
                name="robust_attacks",
                sources=list(SOURCES),
                extra_cuda_cflags=["-O3", "-fmad=false"],
                extra_ldflags=_libraries(cpp_extension.CUDA_HOME),
                is_python_module=False,
            )
    except (RuntimeError, OSError, ImportError) as error:
        raise BackendError(
            f"the CUDA kernels could not be built: {_reason(str(error))}; install nvcc and ninja, or use triton"
        ) from error
    return str(path)


def _libraries(home: str | None) -> list[str]:
    """Where nvcc itself looks for libraries: `home` is only a guess where nvcc is a script in another folder."""
    if home is None:
        raise OSError("no nvcc was found")
    asked = [str(Path(home, "bin", "nvcc")), "-dryrun", "-x", "cu", os.devnull]
    said = subprocess.run(asked, capture_output=True, text=True, check=False).stderr
    return re.findall(r'"(-L[^"]+)"', said)


def _reason(said: str) -> str:
    """The line of a failed build that says why."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it failed without a word"]
    telling = (line for line in lines[1:] if re.search(r"error|fatal|cannot|not found", line, re.IGNORECASE))
    return next(telling, lines[0])[:200]


def bind(path: str) -> ctypes.CDLL:
    """The library at `path`, its functions with their argument types."""
    found = ctypes.CDLL(path)
    for name, types in _SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, ctypes.c_int
    return found


@functools.cache
def library() -> ctypes.CDLL:
    """The built library, once a process."""
    return bind(build())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _call(name: str, made: Tensor, *arguments: int | float | None) -> None:
    """Launches on the current stream of the tensor's device."""
    function = getattr(library(), name)
    with torch.cuda.device_of(made):
        stream = torch.cuda.current_stream(made.device).cuda_stream if made.is_cuda else None
        code = function(*arguments, stream)
    if code:
        raise RuntimeError(f"{name} failed with CUDA error {code}")


def step(
    norm: str,
    made: Tensor,
    points: tuple[Tensor, ...],
    rows: dict[str, Tensor | None],
    low: float,
    high: float,
) -> None:
    """One attack step into `made`; arguments as for the Triton kernels' `step`."""
    before = points[3] if len(points) == 4 else None
    tensors = (made, *points[:3], before, *(rows[name] for name in ("size", "eps", "alpha", "keep", "mask")))
    shape = (len(made), made[0].numel())
    _call("robust_step", made, _NORMS[norm], *shape, low, high, *map(_address, tensors))


def momentum(made: Tensor, gradient: Tensor, velocity: Tensor, decay: float) -> None:
    """decay · velocity + gradient / ‖gradient‖₁ per row into `made`, all (B, …) float32 whose rows are runs."""
    shape = (len(made), made[0].numel())
    _call("robust_momentum", made, *shape, decay, *map(_address, (made, gradient, velocity)))


def loss_gradient(
    name: str,
    value: Tensor,
    gradient: Tensor,
    logits: Tensor,
    y: Tensor,
    targets: Tensor | None,
    reference: Tensor | None,
) -> None:
    """The loss `name` into `value`, its gradient into `gradient`; arguments as for the Triton kernel."""
    tensors = (value, gradient, logits, y, targets, reference)
    _call("robust_loss", logits, LOSSES.index(name), *logits.shape, *map(_address, tensors))
