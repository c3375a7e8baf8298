"""Keyed noise and the votes of smoothed classifiers (Cohen et al. 2019, arXiv:1902.02918), in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from robust.cuda_ops.reference.random import philox

_MASK = 0xFFFFFFFF
_CHUNK = 1 << 14  # blocks of four words at a time: what they pass through stays in a CPU's cache
Key = tuple[int, int]


def words(identity: Tensor, step: Tensor, key: Key, blocks: Tensor) -> tuple[Tensor, ...]:
    """The four Philox words of each row's blocks: the counter is (block, step, identity's low and high 32 bits).

    Args:
        identity, step: (R,) int64.
        key: two integers in [0, 2^32).
        blocks: (M,) int64, the numbers of the blocks.

    Returns:
        Four (R, M) int64 tensors with values in [0, 2^32).
    """
    who = identity[:, None]
    return philox((blocks[None], step[:, None] & _MASK, who & _MASK, (who >> 32) & _MASK), key)


def box_muller(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two words, 24 bits of each (Box & Muller 1958)."""
    radius = ((first >> 8) + 1).to(dtype).mul_(2.0**-24).log_().mul_(-2).sqrt_()
    angle = (second >> 8).to(dtype).mul_(2 * math.pi * 2.0**-24)
    return angle.cos().mul_(radius), angle.sin_().mul_(radius)


def fill_normals(out: Tensor, identity: Tensor, step: Tensor, key: Key) -> Tensor:
    """Fill (R, n) float32 or float64 `out` with standard normals keyed by (identity, step, position)."""

    def convert(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return *box_muller(parts[0], parts[1], out.dtype), *box_muller(parts[2], parts[3], out.dtype)

    return _fill(out, identity, step, key, convert)


def fill_uniforms(out: Tensor, identity: Tensor, step: Tensor, key: Key) -> Tensor:
    """Fill (R, n) float32 `out` with uniforms in [0, 1) of 24 bits, keyed by (identity, step, position)."""

    def convert(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple((part >> 8).to(out.dtype).mul_(2.0**-24) for part in parts)

    return _fill(out, identity, step, key, convert)


def _fill(
    out: Tensor,
    identity: Tensor,
    step: Tensor,
    key: Key,
    convert: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]],
) -> Tensor:
    """Number e of a row is number e % 4 of its block e // 4; done in pieces that fit a cache, in one if compiled."""
    rows, count = out.shape
    blocks = -(-count // 4)
    wide, tall = max(blocks, 1), max(rows, 1)
    if not torch.compiler.is_compiling():
        wide = min(wide, _CHUNK)
        tall = max(1, _CHUNK // wide)
    for top in range(0, rows, tall):
        for left in range(0, blocks, wide):
            numbers = torch.arange(left, min(left + wide, blocks), device=out.device)
            part = words(identity[top : top + tall], step[top : top + tall], key, numbers)
            values = torch.stack(convert(part), dim=-1).flatten(1)
            target = out[top : top + tall, 4 * left : 4 * (left + wide)]
            target.copy_(values[:, : target.shape[1]])
    return out


def rows_of(step: Tensor | int, identity: Tensor) -> Tensor:
    """The step of every row, (B,) int64."""
    return step if isinstance(step, Tensor) else torch.full_like(identity, step)


def noise_batch(
    x: Tensor, sigma: float, identity: Tensor, step: Tensor | int, key: Key, copies: int = 1
) -> Tensor:
    """See `robust.cuda_ops.noise_batch`; float64 inputs get the same noise in float64."""
    rows, count = len(x), math.prod(x.shape[1:])
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(rows * copies, count, dtype=dtype, device=x.device)
    steps = rows_of(step, identity)[:, None] + torch.arange(copies, device=x.device)
    fill_normals(out, identity.repeat_interleave(copies), steps.flatten(), key)
    out.mul_(sigma).view(rows, copies, count).add_(x.reshape(rows, 1, count))
    return out.view(rows * copies, *x.shape[1:]).to(x.dtype)


def vote_counts(scores: Tensor, counts: Tensor, copies: int) -> Tensor:
    """See `robust.cuda_ops.vote_counts`."""
    classes = counts.shape[1]
    if scores.ndim == 1:
        best = scores.long()
        counted = (best >= 0) & (best < classes)
    else:
        top, best = scores.max(1)  # the first of the largest; NaN is larger than all
        counted = top == top
    index = best.clamp(0, classes - 1).view(-1, copies)
    return counts.scatter_add(1, index, counted.view(-1, copies).to(counts.dtype))
