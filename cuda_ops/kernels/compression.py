# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Launches of stochastic quantisation and of sparsification with a residual."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust.cuda_ops.kernels.philox import in_order, signed, uniform, words

_CHUNK = 1024  # numbers that share a scale
_BLOCK = 1024


@triton.jit(do_not_specialize=["k0", "k1", "step", "identity"])
def _quantise(x, codes, scales, n, k0, k1, step, identity, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk: its scale and its codes. Divisions round as IEEE says, so that the bits are the reference's."""
    chunk = tl.program_id(0).to(tl.int64)
    LEVELS: tl.constexpr = 2 ** (BITS - 1) - 1
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    value = tl.load(x + place, mask=place < n, other=0.0).to(tl.float32)
    size = tl.abs(value)
    scale = tl.div_rn(tl.max(size, axis=0), tl.full((), LEVELS, tl.float32))
    scale = tl.maximum(scale, 2.0**-126)
    strange = tl.max((~(size < float("inf"))).to(tl.int32), axis=0)
    tl.store(scales + chunk, tl.where(strange != 0, float("nan"), scale))
    block = chunk * (CHUNK // 4) + tl.arange(0, CHUNK // 4)
    w0, w1, w2, w3 = words(block, step, tl.zeros((), tl.int64) + identity, k0, k1)
    draw = in_order(uniform(w0), uniform(w1), uniform(w2), uniform(w3))
    steps = tl.div_rn(value, tl.zeros_like(value) + scale)
    whole = tl.floor(steps)
    level = whole + tl.where(steps - whole > draw, 1.0, 0.0)
    level = tl.minimum(tl.maximum(level, -LEVELS), LEVELS)
    code = tl.where(strange != 0, 0.0, level).to(tl.int32) + (LEVELS + 1)
    if BITS == 4:
        even, odd = tl.split(tl.reshape(code, (CHUNK // 2, 2)))
        byte = chunk * (CHUNK // 2) + tl.arange(0, CHUNK // 2)
        tl.store(codes + byte, (even | (odd << 4)).to(tl.uint8), mask=2 * byte < n)
    else:
        tl.store(codes + place, code.to(tl.uint8), mask=place < n)


def quantise(x: Tensor, bits: int, key: tuple[int, int], step: int, identity: int) -> tuple[Tensor, Tensor]:
    """See `robust.cuda_ops.quantise`; a chunk that is not finite gets the scale NaN."""
    x = x.contiguous()
    count = x.numel()
    chunks = triton.cdiv(count, _CHUNK)
    codes = torch.empty(count if bits == 8 else -(-count // 2), dtype=torch.uint8, device=x.device)
    scales = torch.empty(chunks, device=x.device)
    if count:
        with torch.cuda.device_of(x):
            _quantise[(chunks,)](
                x, codes, scales, count, *signed(key), step, identity, BITS=bits, CHUNK=_CHUNK
            )
    return codes, scales


@triton.jit
def _dequantise(codes, scales, out, n, BITS: tl.constexpr, CHUNK: tl.constexpr):
    """One chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    place = chunk * CHUNK + tl.arange(0, CHUNK)
    mask = place < n
    if BITS == 4:
        byte = tl.load(codes + place // 2, mask=mask, other=0).to(tl.int32)
        code = (byte >> ((place % 2) * 4).to(tl.int32)) & 15
    else:
        code = tl.load(codes + place, mask=mask, other=0).to(tl.int32)
    level = (code - 2 ** (BITS - 1)).to(tl.float32)
    tl.store(out + place, level * tl.load(scales + chunk), mask=mask)


def dequantise(codes: Tensor, scales: Tensor, bits: int, count: int) -> Tensor:
    """(count,) float32, see `robust.cuda_ops.dequantise`."""
    out = torch.empty(count, device=codes.device)
    if count:
        with torch.cuda.device_of(codes):
            _dequantise[(triton.cdiv(count, _CHUNK),)](
                codes.contiguous(), scales.contiguous(), out, count, BITS=bits, CHUNK=_CHUNK
            )
    return out


@triton.jit
def _sparsify(update, residual, threshold, kept, left, n, BLOCK: tl.constexpr):
    """What is sent and what stays: each number is in one of the two, the other has a zero."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = place < n
    total = tl.load(update + place, mask=mask, other=0.0).to(tl.float32)
    total += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
    total = total.to(kept.dtype.element_ty).to(
        tl.float32
    )  # a sum of half numbers is rounded before it is judged
    small = tl.abs(total) < tl.load(threshold)
    tl.store(kept + place, tl.where(small, 0.0, total), mask=mask)
    tl.store(left + place, tl.where(small, total, 0.0), mask=mask)


def sparsify(update: Tensor, residual: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """See `robust.cuda_ops.sparsify`; threshold a float32 tensor of one number."""
    update, residual = update.contiguous(), residual.contiguous()
    kept, left = torch.empty_like(update), torch.empty_like(update)
    if update.numel():
        with torch.cuda.device_of(update):
            _sparsify[(triton.cdiv(update.numel(), _BLOCK),)](
                update, residual, threshold, kept, left, update.numel(), BLOCK=_BLOCK
            )
    return kept, left
