# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Launches of the weighted sum of rows, and of the trimmed mean and median of every coordinate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS, _COLUMNS = 4, 512  # of a tile of the weighted sum
_PROGRAMS = 1024  # enough for a GPU: with fewer columns than that asks for, the rows are split
_TILE = 2048  # numbers a program holds for selection, in one warp: reductions then need no barrier


@triton.jit
def _weighted(
    rows, factor, out, n, d, per_split,
    SKIP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out[split] = Σ factor[b] · rows[b] over the split's rows; with SKIP, rows of factor 0 are not even read."""
    blocks = tl.cdiv(d, COLUMNS)
    split = tl.program_id(0) // blocks
    column = (tl.program_id(0) % blocks).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    begin = split * per_split
    end = tl.minimum(begin + per_split, n)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        weight = tl.load(factor + row, mask=row < end, other=0.0)
        used = row < end
        if SKIP:
            used = used & (weight != 0)
        place = row.to(tl.int64)[:, None] * d + column[None, :]
        mask = used[:, None] & (column < d)[None, :]
        total += weight[:, None] * tl.load(rows + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + split.to(tl.int64) * d + column, tl.sum(total, axis=0), mask=column < d)


def weighted_sum(rows: Tensor, factor: Tensor, skip: bool) -> Tensor:
    """Σ factor[b] · rows[b] in float32, (n, d) and (n,) -> (d,), always in the same order.

    Args:
        rows: (n, d), float32 or narrower.
        factor: (n,) float32.
        skip: whether a factor of 0 hides what is not finite in its row.
    """
    rows, factor = rows.contiguous(), factor.contiguous()
    n, d = rows.shape
    if rows.numel() == 0:
        return torch.zeros(d, device=rows.device)
    blocks = triton.cdiv(d, _COLUMNS)
    splits = max(1, min(triton.cdiv(_PROGRAMS, blocks), n // (8 * _ROWS)))
    per_split = triton.cdiv(triton.cdiv(n, splits), _ROWS) * _ROWS
    splits = triton.cdiv(n, per_split)
    out = torch.empty(splits, d, device=rows.device)
    with torch.cuda.device_of(rows):
        _weighted[(splits * blocks,)](
            rows, factor, out, n, d, per_split, SKIP=skip, ROWS=_ROWS, COLUMNS=_COLUMNS
        )
    return out[0] if splits == 1 else out.sum(0)


@triton.jit
def _ordered(value):
    """float32 as uint32 in the same order; the two zeros are neighbours."""
    bits = value.to(tl.uint32, bitcast=True)
    flip = tl.where(
        bits >> 31 != 0, tl.full(bits.shape, 0xFFFFFFFF, tl.uint32), tl.full(bits.shape, 1, tl.uint32) << 31
    )
    return bits ^ flip


@triton.jit
def _number(key):
    """The float32 of an ordered uint32."""
    flip = tl.where(
        key >> 31 != 0, tl.full(key.shape, 1, tl.uint32) << 31, tl.full(key.shape, 0xFFFFFFFF, tl.uint32)
    )
    return (key ^ flip).to(tl.float32, bitcast=True)


@triton.jit
def _smallest(keys, rank, COLUMNS: tl.constexpr):
    """The key with `rank` smaller ones in each column, (ROWS, COLUMNS) -> (COLUMNS,): its bits from the top."""
    found = tl.zeros((COLUMNS,), tl.uint32)
    bit = tl.full((COLUMNS,), 1, tl.uint32) << 31
    for _ in range(32):
        trial = found | bit
        below = tl.sum((keys < trial[None, :]).to(tl.int32), axis=0)
        found = tl.where(below <= rank, trial, found)
        bit = bit >> 1
    return found


@triton.jit
def _trimmed(updates, out, n, d, trim, KEPT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mean of what is left of each column without its `trim` smallest and largest numbers.

    With a and b the smallest and the largest kept: Σ over a < u < b, and a and b as often as they are kept. KEPT is 1
    or 2 for a median, which needs one selection, and 3 for more.
    """
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.arange(0, ROWS)
    mask = (row < n)[:, None] & (column < d)[None, :]
    place = row.to(tl.int64)[:, None] * d + column[None, :]
    value = tl.load(updates + place, mask=mask, other=0.0).to(tl.float32)
    broken = tl.max((value != value).to(tl.int32), axis=0)
    last = tl.full((ROWS, COLUMNS), 0xFFFFFFFF, tl.uint32)  # rows of padding come after every number
    keys = tl.where((row < n)[:, None], _ordered(value), last)
    low = _smallest(keys, trim, COLUMNS)
    a = _number(low)
    if KEPT == 1:
        mean = a
    elif KEPT == 2:
        again = tl.sum((keys <= low[None, :]).to(tl.int32), axis=0) > trim + 1
        following = tl.min(tl.where(keys > low[None, :], keys, last), axis=0)
        mean = 0.5 * a + 0.5 * _number(tl.where(again, low, following))
    else:
        high = _smallest(keys, n - 1 - trim, COLUMNS)
        b = _number(high)
        between = (keys > low[None, :]) & (keys < high[None, :])
        first = tl.sum((keys <= low[None, :]).to(tl.int32), axis=0) - trim
        second = n - trim - tl.sum((keys < high[None, :]).to(tl.int32), axis=0)
        total = tl.sum(tl.where(between, value, 0.0), axis=0)
        mean = (first.to(tl.float32) * a + total + second.to(tl.float32) * b) / (n - 2 * trim)
        mean = tl.where(low == high, a, mean)
    tl.store(out + column, tl.where(broken != 0, float("nan"), mean), mask=column < d)


def trimmed_mean(updates: Tensor, trim: int) -> Tensor:
    """See `robust.cuda_ops.trimmed_mean`; the median is that of trim = (n - 1) // 2."""
    updates = updates.contiguous()
    n, d = updates.shape
    out = updates.new_empty(d)
    rows = max(2, triton.next_power_of_2(n))
    columns = max(1, min(_TILE // rows, 512))
    if d:
        with torch.cuda.device_of(updates):
            _trimmed[(triton.cdiv(d, columns),)](
                updates, out, n, d, trim, KEPT=min(n - 2 * trim, 3), ROWS=rows, COLUMNS=columns, num_warps=1
            )
    return out
