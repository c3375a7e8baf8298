"""Per-sample norms, clipped sums and noisy updates for DP-SGD (Abadi et al. 2016, arXiv:1607.00133), fused."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robust.cuda_ops.operators import operator
from robust.cuda_ops.reference import privacy as reference
from robust.cuda_ops.reference.smoothing import Key
from robust.cuda_ops.smoothing import check_key, plain


def per_sample_norm(grads: Tensor | Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of each sample's gradient.

    Args:
        grads: (B, …), or one such tensor for each parameter.

    Returns:
        (B,) float32 (float64 for float64): inf or NaN for a row that is not finite, and inf for one whose square is
        beyond that range.

    Raises:
        ValueError: no tensors, or tensors with different numbers of rows.
    """
    parts = [grads] if isinstance(grads, Tensor) else list(grads)
    if not parts or any(part.ndim < 1 or len(part) != len(parts[0]) for part in parts):
        raise ValueError(f"grads {[tuple(part.shape) for part in parts]}: tensors (B, …) with one B")
    if any(plain(part) for part in parts):
        return reference.per_sample_norm(parts)
    found: Tensor = _NORM(parts)
    return found


def clip_accumulate(grads: Tensor, norms: Tensor | None, max_norm: float) -> tuple[Tensor, Tensor]:
    """The sum of the samples' gradients, each scaled down to at most `max_norm`.

    Args:
        grads: (B, n) per-sample gradients.
        norms: (B,) their norms, over all parameters if `grads` is one of several; None for the rows' own.
        max_norm: the sensitivity, above 0.

    Returns:
        (n,) Σ min(1, max_norm / ‖g‖) · g, summed in float32 (float64 for float64), and the norms that were used. A
        row whose norm is not finite contributes nothing, and its norm reports it. Adding or removing a row changes
        the sum by at most max_norm, up to rounding.

    Raises:
        ValueError: `max_norm` is not positive, or the norms are not one per row.
    """
    if not 0 < max_norm < float("inf"):
        raise ValueError(f"max_norm={max_norm}: positive and finite is wanted")
    if grads.ndim != 2 or (norms is not None and norms.shape != grads.shape[:1]):
        raise ValueError(
            f"grads {tuple(grads.shape)}, norms {None if norms is None else tuple(norms.shape)}: (B, n) and (B,)"
        )
    if plain(grads):
        return reference.clip_accumulate(grads, norms, max_norm)
    own = per_sample_norm(grads) if norms is None else norms
    found: Tensor = _CLIP(grads, own, max_norm)
    return found, own


def noise_update(
    param: Tensor,
    summed: Tensor,
    momentum: Tensor | None,
    lr: float,
    momentum_factor: float,
    noise_std: float,
    batch_size: float,
    key: Key,
    step: int,
    identity: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """One step of SGD on a noisy mean of clipped gradients: m' = μ m + (summed + std · z) / batch, p' = p - lr · m'.

    Args:
        param: (…) a parameter.
        summed: the clipped sum, of its shape.
        momentum: m so far, of its shape; None for zeros.
        lr: learning rate.
        momentum_factor: μ; 0 keeps no momentum.
        noise_std: standard deviation of the noise on the sum: noise multiplier × max_norm, at least 0.
        batch_size: the expected number of samples, above 0.
        key: two integers in [0, 2^32). Whoever knows it can remove the noise: draw it from a secret.
        step: number of the update; the same (key, step, identity) draws the same noise.
        identity: number of the parameter, so that parameters with one key get independent noise.

    Returns:
        The new parameter and the new momentum (None if `momentum_factor` is 0), in param's shape and dtype.

    Raises:
        ValueError: shapes that differ, a negative noise or an empty batch.
    """
    check_key(key)
    if not noise_std >= 0 or not batch_size > 0:
        raise ValueError(f"noise_std={noise_std}, batch_size={batch_size}: at least 0, and above 0")
    if summed.shape != param.shape or (momentum is not None and momentum.shape != param.shape):
        raise ValueError(
            f"param {tuple(param.shape)}, summed {tuple(summed.shape)}: one shape, momentum's too"
        )
    numbers = (lr, momentum_factor, noise_std, batch_size)
    if plain(param):
        return reference.noise_update(param, summed, momentum, *numbers, key, step, identity)
    moved, kept = _UPDATE(param, summed, momentum, *numbers, *key, step, identity)
    return moved, kept if momentum_factor else None


def _norm(grads: list[Tensor]) -> Tensor:
    from robust.cuda_ops.kernels import privacy as kernels

    return kernels.per_sample_norm(grads)


def _norm_fake(grads: list[Tensor]) -> Tensor:
    return grads[0].new_empty(grads[0].shape[0], dtype=torch.float32)


def _clip(grads: Tensor, norms: Tensor, max_norm: float) -> Tensor:
    from robust.cuda_ops.kernels import privacy as kernels

    return kernels.clip_accumulate(grads, norms, max_norm)


def _clip_fake(grads: Tensor, norms: Tensor, max_norm: float) -> Tensor:
    return grads.new_empty(grads.shape[1], dtype=torch.float32)


def _update(
    param: Tensor,
    summed: Tensor,
    momentum: Tensor | None,
    lr: float,
    factor: float,
    std: float,
    batch: float,
    k0: int,
    k1: int,
    step: int,
    identity: int,
) -> tuple[Tensor, Tensor]:
    from robust.cuda_ops.kernels import privacy as kernels

    return kernels.noise_update(param, summed, momentum, lr, factor, std, batch, (k0, k1), step, identity)


def _update_fake(
    param: Tensor,
    summed: Tensor,
    momentum: Tensor | None,
    lr: float,
    factor: float,
    std: float,
    batch: float,
    k0: int,
    k1: int,
    step: int,
    identity: int,
) -> tuple[Tensor, Tensor]:
    return param.new_empty(param.shape), param.new_empty(param.shape if factor != 0 else (0,))


_NORM = operator("per_sample_norm", "(Tensor[] grads) -> Tensor", _norm, _norm_fake)
_CLIP = operator(
    "clip_accumulate", "(Tensor grads, Tensor norms, float max_norm) -> Tensor", _clip, _clip_fake
)
_UPDATE = operator(
    "noise_update",
    "(Tensor param, Tensor summed, Tensor? momentum, float lr, float factor, float std, float batch, "
    "int k0, int k1, int step, int identity) -> (Tensor, Tensor)",
    _update,
    _update_fake,
)
