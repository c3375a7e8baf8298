"""Noise batches and votes for randomised smoothing (Cohen et al. 2019, arXiv:1902.02918), fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust.cuda_ops.dispatch import Backend, backend
from robust.cuda_ops.operators import operator
from robust.cuda_ops.reference import smoothing as reference
from robust.cuda_ops.reference.smoothing import Key

DEFAULT: Backend = "triton"
MOST = 8192  # classes that one program of the vote's kernel can hold


def plain(tensor: Tensor) -> bool:
    """Whether the reference runs: the kernels compute in float32, so float64 is never theirs."""
    return tensor.dtype == torch.float64 or backend(tensor, DEFAULT) == "reference"


def check_key(key: Key) -> None:
    """Refuse what is no Philox key."""
    if len(key) != 2 or not all(0 <= word < 2**32 for word in key):
        raise ValueError(f"key={key} is no key; two integers in [0, 2^32) are")


def noise_batch(
    x: Tensor, sigma: float, identity: Tensor, step: Tensor | int, key: Key, copies: int = 1
) -> Tensor:
    """Noisy copies of a batch: x + sigma · z, where z is a function of (key, identity, step, position) alone.

    Args:
        x: (B, …) floating point.
        sigma: the noise's standard deviation in the unit of x, at least 0.
        identity: (B,) int64, who the rows are, whatever batch they share.
        step: the row's first step, (B,) int64 or one number for all; copy k draws at step + k (modulo 2^32).
        key: two integers in [0, 2^32).
        copies: noisy copies of each row.

    Returns:
        (B · copies, …) in x's dtype; copy k of row b is row b · copies + k. The standard normals are those of
        `robust.rng.Draws.normal`: Philox4x32-10 words bit for bit, Box-Muller to a few ulp. The gradient with respect
        to x is the sum over the copies.

    Raises:
        ValueError: a negative sigma, no copies, a wrong key, or identities or steps that are not one per row.
    """
    check_key(key)
    if not sigma >= 0 or copies < 1:
        raise ValueError(f"sigma={sigma}, copies={copies}: sigma is at least 0, and copies at least 1")
    keys = [identity, step] if isinstance(step, Tensor) else [identity]
    if not x.is_floating_point() or any(k.shape != x.shape[:1] or k.dtype != torch.int64 for k in keys):
        raise ValueError(
            f"x {tuple(x.shape)} {x.dtype}, identity {tuple(identity.shape)} {identity.dtype}: floating point, and "
            f"int64 (B,); the same for step, unless it is one number"
        )
    if plain(x):
        return reference.noise_batch(x, sigma, identity, step, key, copies)
    steps = reference.rows_of(step, identity)
    found: Tensor = _NOISE(x, sigma, identity, steps, *key, copies)
    return found


def vote_counts(scores: Tensor, counts: Tensor, copies: int) -> Tensor:
    """Adds the votes of a noise batch to the counts of its images.

    Args:
        scores: (B · copies, K) logits, whose largest is the vote (the first of equals), or (B · copies,) integer
            predictions; in the order of `noise_batch`.
        counts: (B, K) int64 so far; it is not changed.
        copies: rows per image.

    Returns:
        (B, K) int64. A row with a NaN votes for nobody, nor does a prediction outside [0, K).

    Raises:
        ValueError: shapes that do not fit together, or counts that are not int64.
    """
    images, classes = counts.shape
    shape = (images * copies, classes) if scores.ndim == 2 else (images * copies,)
    floats = scores.is_floating_point()
    if classes < 1 or copies < 1 or tuple(scores.shape) != shape or (scores.ndim == 2) != floats:
        raise ValueError(
            f"scores {tuple(scores.shape)} {scores.dtype}: for counts {tuple(counts.shape)} and {copies} copies, "
            f"logits ({images * copies}, {classes}) or integer predictions ({images * copies},)"
        )
    if counts.dtype != torch.int64:
        raise ValueError(f"counts {counts.dtype}: int64 is wanted")
    if plain(scores) or classes > MOST:
        return reference.vote_counts(scores, counts, copies)
    found: Tensor = _VOTES(scores, counts, copies)
    return found


def _noise(x: Tensor, sigma: float, identity: Tensor, step: Tensor, k0: int, k1: int, copies: int) -> Tensor:
    from robust.cuda_ops.kernels import smoothing as kernels

    return kernels.noise_batch(x, sigma, identity, step, (k0, k1), copies)


def _noise_fake(
    x: Tensor, sigma: float, identity: Tensor, step: Tensor, k0: int, k1: int, copies: int
) -> Tensor:
    return x.new_empty(x.shape[0] * copies, *x.shape[1:])


def _noise_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.copies = inputs[-1]


def _noise_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    rows = gradient.shape[0] // ctx.copies
    return gradient.unflatten(0, (rows, ctx.copies)).sum(1), None, None, None, None, None, None


def _votes(scores: Tensor, counts: Tensor, copies: int) -> Tensor:
    from robust.cuda_ops.kernels import smoothing as kernels

    return kernels.vote_counts(scores, counts, copies)


def _votes_fake(scores: Tensor, counts: Tensor, copies: int) -> Tensor:
    return counts.new_empty(counts.shape)


_NOISE = operator(
    "noise_batch",
    "(Tensor x, float sigma, Tensor identity, Tensor step, int k0, int k1, int copies) -> Tensor",
    _noise,
    _noise_fake,
)
torch.library.register_autograd("robust::noise_batch", _noise_gradient, setup_context=_noise_context)
_VOTES = operator("vote_counts", "(Tensor scores, Tensor counts, int copies) -> Tensor", _votes, _votes_fake)
