"""Stochastic quantisation (Alistarh et al. 2017, arXiv:1610.02132) and sparsification with a residual, fused."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from robust.cuda_ops.operators import operator
from robust.cuda_ops.reference import compression as reference
from robust.cuda_ops.reference.compression import CHUNK
from robust.cuda_ops.reference.smoothing import Key
from robust.cuda_ops.smoothing import check_key, plain


def quantise(x: Tensor, bits: int, key: Key, step: int, identity: int = 0) -> tuple[Tensor, Tensor]:
    """Unbiased uniform quantisation: x / scale rounded up with the probability of its fraction, down otherwise.

    Args:
        x: (…) finite numbers, taken as float32.
        bits: 8 (levels -127 … 127) or 4 (levels -7 … 7).
        key, step, identity: place of the uniforms, one Philox word for each number; identity is the client.

    Returns:
        codes: uint8, level + 128, (numel,); or level + 8, two in a byte, the first one low, (⌈numel / 2⌉,).
        scale: (⌈numel / 1024⌉,) float32, the step of each run of 1,024 numbers: their largest size over the largest
        level, and at least 2^-126. Restored numbers are at most one step from x, and their mean is x.

    Raises:
        ValueError: other bits, a wrong key, or an x that is not finite. In a compiled or captured graph, which cannot
            ask, such an x is not refused: the scale of its chunk is then infinite or NaN.
    """
    check_key(key)
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: 4 or 8 is wanted")
    if plain(x):
        codes, scale = reference.quantise(x, bits, key, step, identity)
    else:
        codes, scale = _QUANTISE(x, bits, *key, step, identity)
    graph = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
    if not graph and not bool(scale.isfinite().all()):
        raise ValueError(
            "x holds NaN or an infinity, or float32 cannot hold it: only finite numbers have a code"
        )
    return codes, scale


def dequantise(codes: Tensor, scale: Tensor, bits: int, shape: Sequence[int]) -> Tensor:
    """What `quantise` encoded, to within a step.

    Args:
        codes, scale, bits: as `quantise` returned and took them.
        shape: of the result.

    Returns:
        (*shape) in the scale's dtype.

    Raises:
        ValueError: lengths that do not belong to this shape.
    """
    count = math.prod(shape)
    if bits not in (4, 8):
        raise ValueError(f"bits={bits}: 4 or 8 is wanted")
    lengths = (-(-count * bits // 8), -(-count // CHUNK))
    if codes.dtype != torch.uint8 or (len(codes), len(scale)) != lengths:
        raise ValueError(
            f"{len(codes)} codes {codes.dtype}, {len(scale)} scales; {lengths[0]} uint8 and {lengths[1]} are wanted"
        )
    if plain(scale):
        return reference.dequantise(codes, scale, bits, shape)
    found: Tensor = _DEQUANTISE(codes, scale, bits, count)
    return found.view(*shape)


def sparsify(update: Tensor, residual: Tensor, threshold: float | Tensor) -> tuple[Tensor, Tensor]:
    """Threshold sparsification with local accumulation: what is too small to send waits for the next round.

    Args:
        update, residual: (…) one shape and dtype; the residual is what earlier rounds left.
        threshold: smallest size that is sent, at least 0: a number, or a tensor of one (of a top-k, say).

    Returns:
        kept: (…) the entries of update + residual with |·| >= threshold, 0 elsewhere; a NaN is sent too, so that the
        receiver sees it and no residual is poisoned.
        residual: (…) the others. kept + residual is update + residual bit for bit.

    Raises:
        ValueError: shapes or dtypes that differ, or a negative threshold.
    """
    if update.shape != residual.shape or update.dtype != residual.dtype:
        raise ValueError(
            f"update {tuple(update.shape)} {update.dtype}, residual {tuple(residual.shape)} {residual.dtype}: alike"
        )
    if isinstance(threshold, Tensor):
        if threshold.numel() != 1:
            raise ValueError(f"threshold {tuple(threshold.shape)}: one number is wanted")
    elif not threshold >= 0:
        raise ValueError(f"threshold={threshold}: at least 0 is wanted")
    if plain(update):
        return reference.sparsify(update, residual, threshold)
    if isinstance(threshold, Tensor):
        limit = threshold.to(update.device, torch.float32)
    else:
        limit = torch.full((), threshold, device=update.device)
    kept, left = _SPARSIFY(update, residual, limit)
    return kept, left


def _quantise(x: Tensor, bits: int, k0: int, k1: int, step: int, identity: int) -> tuple[Tensor, Tensor]:
    from robust.cuda_ops.kernels import compression as kernels

    return kernels.quantise(x, bits, (k0, k1), step, identity)


def _quantise_fake(x: Tensor, bits: int, k0: int, k1: int, step: int, identity: int) -> tuple[Tensor, Tensor]:
    count = x.numel()
    codes = x.new_empty(count if bits == 8 else (count + 1) // 2, dtype=torch.uint8)
    return codes, x.new_empty((count + CHUNK - 1) // CHUNK, dtype=torch.float32)


def _dequantise(codes: Tensor, scale: Tensor, bits: int, count: int) -> Tensor:
    from robust.cuda_ops.kernels import compression as kernels

    return kernels.dequantise(codes, scale, bits, count)


def _dequantise_fake(codes: Tensor, scale: Tensor, bits: int, count: int) -> Tensor:
    return scale.new_empty(count, dtype=torch.float32)


def _sparsify(update: Tensor, residual: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    from robust.cuda_ops.kernels import compression as kernels

    return kernels.sparsify(update, residual, threshold)


def _sparsify_fake(update: Tensor, residual: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    return update.new_empty(update.shape), update.new_empty(update.shape)


_QUANTISE = operator(
    "quantise",
    "(Tensor x, int bits, int k0, int k1, int step, int identity) -> (Tensor, Tensor)",
    _quantise,
    _quantise_fake,
)
_DEQUANTISE = operator(
    "dequantise", "(Tensor codes, Tensor scale, int bits, int count) -> Tensor", _dequantise, _dequantise_fake
)
_SPARSIFY = operator(
    "sparsify",
    "(Tensor update, Tensor residual, Tensor threshold) -> (Tensor, Tensor)",
    _sparsify,
    _sparsify_fake,
)
