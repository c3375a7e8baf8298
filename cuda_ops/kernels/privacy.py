# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Launches of per-sample norms and of the noisy update; the clipped sum is the weighted sum of `aggregation`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust.cuda_ops.kernels.aggregation import weighted_sum
from robust.cuda_ops.kernels.philox import normals, signed

_PART = 16384  # numbers of a row whose squares one program adds up
_BLOCK = 1024
_PHILOX = 256  # blocks of four numbers per program of the update


@triton.jit
def _squares(grads, out, n, parts, stride, PART: tl.constexpr, BLOCK: tl.constexpr):
    """out[b · stride + part] = Σ grads[b]² over a part of the row."""
    row = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    base = grads + row.to(tl.int64) * n
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, PART, BLOCK):
        place = part.to(tl.int64) * PART + start + tl.arange(0, BLOCK)
        value = tl.load(base + place, mask=place < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(out + row.to(tl.int64) * stride + part, tl.sum(total, axis=0))


def per_sample_norm(grads: Sequence[Tensor]) -> Tensor:
    """The norm of each row over all tensors (B, …): partial sums of squares, then their sum, in one order."""
    rows = len(grads[0])
    flat = [grad.reshape(rows, grad[:1].numel()).contiguous() for grad in grads]
    counts = [triton.cdiv(part.shape[1], _PART) for part in flat]
    partial = torch.empty(rows, sum(counts), device=grads[0].device)
    column = 0
    for part, count in zip(flat, counts, strict=True):
        if part.numel():
            with torch.cuda.device_of(part):
                _squares[(rows * count,)](
                    part,
                    partial[:, column:],
                    part.shape[1],
                    count,
                    partial.shape[1],
                    PART=_PART,
                    BLOCK=_BLOCK,
                )
        column += count
    return partial.sum(1).sqrt_()


def clip_accumulate(grads: Tensor, norms: Tensor, max_norm: float) -> Tensor:
    """Σ min(1, max_norm / ‖g‖) · g over the rows with a finite norm."""
    factor = (max_norm / norms.float()).clamp_max_(1)
    return weighted_sum(grads, factor.masked_fill_(~norms.isfinite(), 0), skip=True)


@triton.jit(do_not_specialize=["k0", "k1", "step", "identity"])
def _update(
    param, summed, momentum, moved, kept, n, lr, factor, std, batch, k0, k1, step, identity,
    READS: tl.constexpr, WRITES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m' = factor · m + (summed + std · z) / batch and p' = p - lr · m'."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    z = normals(first + tl.arange(0, BLOCK), step, tl.zeros((), tl.int64) + identity, k0, k1)
    place = 4 * first + tl.arange(0, 4 * BLOCK)
    mask = place < n
    value = (tl.load(summed + place, mask=mask, other=0.0).to(tl.float32) + std * z) / batch
    if READS:
        value += factor * tl.load(momentum + place, mask=mask, other=0.0).to(tl.float32)
    if WRITES:
        tl.store(kept + place, value, mask=mask)
    old = tl.load(param + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(moved + place, old - lr * value, mask=mask)


def noise_update(
    param: Tensor,
    summed: Tensor,
    momentum: Tensor | None,
    lr: float,
    momentum_factor: float,
    noise_std: float,
    batch_size: float,
    key: tuple[int, int],
    step: int,
    identity: int,
) -> tuple[Tensor, Tensor]:
    """See `robust.cuda_ops.noise_update`; where no momentum is kept, the second tensor is empty."""
    param, summed = param.contiguous(), summed.contiguous()
    keeps = momentum_factor != 0
    reads = keeps and momentum is not None
    moved = torch.empty_like(param)
    kept = torch.empty_like(param) if keeps else param.new_empty(0)
    if param.numel():
        with torch.cuda.device_of(param):
            _update[(triton.cdiv(param.numel(), 4 * _PHILOX),)](
                param,
                summed,
                momentum.contiguous() if reads and momentum is not None else param,
                moved,
                kept if keeps else moved,
                param.numel(),
                lr,
                momentum_factor,
                noise_std,
                batch_size,
                *signed(key),
                step,
                identity,
                READS=reads,
                WRITES=keeps,
                BLOCK=_PHILOX,
            )
    return moved, kept
