# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Launches of the noise and the votes of smoothed classifiers."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust.cuda_ops.kernels.philox import normals, signed

_BLOCK = 256  # Philox blocks of four numbers per program
_TILE = 4096  # logits that a program holds


@triton.jit(do_not_specialize=["k0", "k1"])
def _noise(x, identity, step, out, n, copies, sigma, k0, k1, BLOCK: tl.constexpr):
    """out[b · copies + k, e] = x[b, e] + sigma · z(identity[b], step[b] + k, e)."""
    parts = tl.cdiv(n, 4 * BLOCK)
    row = tl.program_id(0) // parts
    part = (tl.program_id(0) % parts).to(tl.int64)
    source = row // copies
    who = tl.load(identity + source)
    when = tl.load(step + source) + row % copies
    z = normals(part * BLOCK + tl.arange(0, BLOCK), when, who, k0, k1)
    place = part * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    mask = place < n
    value = tl.load(x + source.to(tl.int64) * n + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row.to(tl.int64) * n + place, value + sigma * z, mask=mask)


def noise_batch(
    x: Tensor, sigma: float, identity: Tensor, step: Tensor, key: tuple[int, int], copies: int
) -> Tensor:
    """See `robust.cuda_ops.noise_batch`; step (B,)."""
    x = x.contiguous()
    count = math.prod(x.shape[1:])
    out = x.new_empty(len(x) * copies, *x.shape[1:])
    grid = (len(out) * triton.cdiv(count, 4 * _BLOCK),)
    if out.numel():
        with torch.cuda.device_of(x):
            _noise[grid](
                x,
                identity.contiguous(),
                step.contiguous(),
                out,
                count,
                copies,
                sigma,
                *signed(key),
                BLOCK=_BLOCK,
            )
    return out


@triton.jit
def _vote(
    scores, counts, copies, classes, parts,
    LABELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds one program's votes, ROWS copies of one image, to the image's counts: integers, so in any order."""
    image = tl.program_id(0) // parts
    copy = tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    row = image.to(tl.int64) * copies + copy
    counted = copy < copies
    if LABELS:
        best = tl.load(scores + row, mask=counted, other=-1).to(tl.int64)
    else:
        mask = counted[:, None] & (column < classes)[None, :]
        value = tl.load(scores + row[:, None] * classes + column[None, :], mask=mask, other=float("-inf"))
        value = value.to(tl.float32)
        best = tl.argmax(value, axis=1, tie_break_left=True)
        counted = counted & (tl.max((value != value).to(tl.int32), axis=1) == 0)
    hits = (best[:, None] == column[None, :]) & counted[:, None]
    votes = tl.sum(hits.to(tl.int32), axis=0)
    place = counts + image.to(tl.int64) * classes + column
    tl.atomic_add(place, votes.to(tl.int64), mask=(column < classes) & (votes > 0))


def vote_counts(scores: Tensor, counts: Tensor, copies: int) -> Tensor:
    """See `robust.cuda_ops.vote_counts`."""
    images, classes = counts.shape
    out = counts.clone(memory_format=torch.contiguous_format)
    columns = max(2, triton.next_power_of_2(classes))
    rows = max(2, min(_TILE // columns, triton.next_power_of_2(copies)))
    parts = triton.cdiv(copies, rows)
    if scores.numel():
        with torch.cuda.device_of(scores):
            _vote[(images * parts,)](
                scores.contiguous(),
                out,
                copies,
                classes,
                parts,
                LABELS=scores.ndim == 1,
                ROWS=rows,
                COLUMNS=columns,
            )
    return out
