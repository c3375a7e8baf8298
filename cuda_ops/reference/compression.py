"""Stochastic quantisation (Alistarh et al. 2017, arXiv:1610.02132) and sparsification, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from robust.cuda_ops.reference.images import working
from robust.cuda_ops.reference.smoothing import Key, fill_uniforms

CHUNK = 1024  # numbers that share a scale
TINY = 2.0**-126  # the smallest scale: below float32's normal numbers a step would lose its precision


def quantise(x: Tensor, bits: int, key: Key, step: int, identity: int = 0) -> tuple[Tensor, Tensor]:
    """See `robust.cuda_ops.quantise`; always in float32. A chunk that is not finite gets such a scale."""
    flat = x.reshape(-1).float()
    count, levels = len(flat), 2 ** (bits - 1) - 1
    chunks = F.pad(flat, (0, -count % CHUNK)).view(-1, CHUNK)
    if count == 0:
        return torch.empty(0, dtype=torch.uint8, device=x.device), flat
    low, high = chunks.aminmax(dim=1)
    scale = (torch.maximum(low.neg_(), high) / levels).clamp_min_(TINY)
    who, when = (torch.full((1,), number, device=x.device) for number in (identity, step))
    uniform = fill_uniforms(torch.empty(1, chunks.numel(), device=x.device), who, when, key)
    steps = chunks / scale[:, None]
    whole = steps.floor()
    up = steps.sub_(whole).gt_(uniform.view_as(steps))  # the fraction is the probability to round up
    levelled = whole.add_(up).clamp_(-levels, levels).add_(levels + 1)
    codes = levelled.to(torch.uint8).view(-1)
    if bits == 4:
        packed = codes[0::2] | (codes[1::2] << 4)
        return packed[: -(-count // 2)].clone(), scale
    return codes[:count].clone(), scale


def dequantise(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """See `robust.cuda_ops.dequantise`."""
    count = math.prod(shape)
    if bits == 4:
        codes = torch.stack((codes & 15, codes >> 4), dim=1).flatten()[:count]
    values = codes.to(scale.dtype).sub_(2 ** (bits - 1))
    full = count // CHUNK
    values[: full * CHUNK].view(full, CHUNK).mul_(scale[:full, None])
    values[full * CHUNK :].mul_(scale[full:])
    return values.view(*shape)


def sparsify(update: Tensor, residual: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """See `robust.cuda_ops.sparsify`."""
    total = update + residual
    small = working(total).abs() < threshold
    kept = total.masked_fill(small, 0)
    return kept, total.masked_fill_(small.logical_not_(), 0)
