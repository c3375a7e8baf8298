# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Attack steps in Triton: linf moves each tensor once; `l2` and `l1` give a program to each row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust.cuda_ops.reference.steps import THINNEST

_THINNEST = tl.constexpr(THINNEST)
_FLAT = 1024  # elements of a program where rows need no sums: two 16-byte loads a thread and tensor
LONGEST = 16384  # the longest row that stays in registers
_RUN = 4096  # elements at a time of a longer one
EXACTLY = {"enable_fp_fusion": False}  # products and sums round as in the reference


@triton.jit
def _sign(values):
    """1, 0 or −1; NaN has the sign 0."""
    return (values > 0).to(tl.float32) - (values < 0).to(tl.float32)


@triton.jit
def _boxed(values, low, high):
    """Clamped to the box."""
    return tl.minimum(tl.maximum(values, low), high)


@triton.jit
def _mixed(moved, origin, before, alpha):
    """APGD's two terms: origin + α (moved − origin) + (1 − α) (origin − before)."""
    return origin + alpha * (moved - origin) + (1 - alpha) * (origin - before)


@triton.jit
def _onto_linf(moved, x, eps, low, high):
    return _boxed(tl.minimum(tl.maximum(moved, x - eps), x + eps), low, high)


@triton.jit
def _linf(
    made, at, gradient, x, before, size, eps, alpha, mask, n, low, high,
    MASKED: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = column < n
    place = row * n + column
    centre = tl.load(x + place, mask=there, other=0.0)
    origin = tl.load(at + place, mask=there, other=0.0)
    slope = tl.load(gradient + place, mask=there, other=0.0)
    radius = tl.load(eps + row)
    moved = origin + tl.load(size + row) * _sign(slope)
    moved = _onto_linf(moved, centre, radius, low, high)
    if TWO:
        last = tl.load(before + place, mask=there, other=0.0)
        moved = _mixed(moved, origin, last, tl.load(alpha + row))
        moved = _onto_linf(moved, centre, radius, low, high)
    if MASKED:
        moved = tl.where(tl.load(mask + row) != 0, moved, origin)
    tl.store(made + place, moved, mask=there)


@triton.jit
def _finite(values):
    """0 where a number is NaN or infinite."""
    return tl.where(tl.abs(values) < float("inf"), values, 0.0)


@triton.jit
def _momentum(made, gradient, velocity, decay, n: tl.constexpr, HOLD: tl.constexpr, BLOCK: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * n
    column = tl.arange(0, BLOCK)
    if HOLD:
        there = column < n
        place = base + column
        slope = _finite(tl.load(gradient + place, mask=there, other=0.0))
        length = tl.maximum(tl.sum(tl.abs(slope)), _THINNEST)
        last = tl.load(velocity + place, mask=there, other=0.0)
        tl.store(made + place, decay * last + slope / length, mask=there)
    else:
        parts = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            there = start + column < n
            parts += tl.abs(_finite(tl.load(gradient + base + start + column, mask=there, other=0.0)))
        length = tl.maximum(tl.sum(parts), _THINNEST)
        for start in range(0, n, BLOCK):
            there = start + column < n
            place = base + start + column
            slope = _finite(tl.load(gradient + place, mask=there, other=0.0))
            last = tl.load(velocity + place, mask=there, other=0.0)
            tl.store(made + place, decay * last + slope / length, mask=there)


def block(n: int) -> tuple[int, int]:
    """The elements of a row of `n` that a program holds at a time, and its warps."""
    size = triton.next_power_of_2(n) if n <= LONGEST else _RUN
    return size, min(max(size // 512, 1), 32)


def step(
    norm: str,
    made: Tensor,
    points: tuple[Tensor, ...],
    rows: dict[str, Tensor | None],
    low: float,
    high: float,
) -> None:
    """One attack step into `made`.

    Args:
        norm: linf, l2 or l1.
        made: (B, …) float32, not empty; its rows are runs of memory, as those of all points.
        points: at, gradient, x, and for APGD's second term the iterate before.
        rows: (B,) size, eps; alpha for APGD; keep for l1; mask (bool) or None.
        low, high: the box.
    """
    from robust.cuda_ops.kernels import l1, l2

    at, gradient, x = points[:3]
    before = points[3] if len(points) == 4 else None
    mask = rows["mask"]
    mask = None if mask is None else mask.view(torch.uint8)
    size, eps, alpha = rows["size"], rows["eps"], rows["alpha"]
    count, n = len(made), made[0].numel()
    flags = {"MASKED": mask is not None, "TWO": before is not None, **EXACTLY}
    with torch.cuda.device_of(made):
        if norm == "linf":
            width = min(_FLAT, triton.next_power_of_2(n))
            flat = (size, eps, alpha, mask, n, low, high)
            grid = (count, triton.cdiv(n, width))
            _linf[grid](made, at, gradient, x, before, *flat, **flags, BLOCK=width, num_warps=4)
            return
        numbers = (size, eps, alpha, rows["keep"], mask, n, low, high)
        kernel = {"l2": l2, "l1": l1}[norm].KERNELS[n > LONGEST]
        width, warps = block(n)
        kernel[(count,)](made, at, gradient, x, before, *numbers, **flags, BLOCK=width, num_warps=warps)


def momentum(made: Tensor, gradient: Tensor, velocity: Tensor, decay: float) -> None:
    """decay · velocity + gradient / ‖gradient‖₁ per row into `made`, all (B, …) float32 whose rows are runs."""
    n = made[0].numel()
    width, warps = block(n)
    flags = {"HOLD": n <= LONGEST, "BLOCK": width, "num_warps": warps, **EXACTLY}
    with torch.cuda.device_of(made):
        _momentum[(len(made),)](made, gradient, velocity, decay, n, **flags)
