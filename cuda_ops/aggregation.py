"""Mean, median and trimmed mean of stacked updates (Yin et al. 2018, arXiv:1803.01498), fused."""

from __future__ import annotations

import torch
from torch import Tensor

from robust.cuda_ops.operators import operator
from robust.cuda_ops.reference import aggregation as reference
from robust.cuda_ops.smoothing import plain

MOST = 4096  # updates whose coordinate one program of the kernel can hold


def stacked_mean(updates: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ w u / Σ w of the updates; what is not finite spreads to its coordinate, whatever its weight.

    Args:
        updates: (n, d), n at least 1.
        weights: (n,) with a positive sum; None for equal ones.

    Returns:
        (d,) in the updates' dtype, summed in float32 at least.

    Raises:
        ValueError: no updates, or weights that are not one per update.
    """
    _check(updates)
    if weights is not None and weights.shape != updates.shape[:1]:
        raise ValueError(f"weights {tuple(weights.shape)} for {len(updates)} updates: one per update")
    if plain(updates):
        return reference.stacked_mean(updates, weights)
    if weights is None:
        share = torch.full((len(updates),), 1 / len(updates), device=updates.device)
    else:
        share = weights.float() / weights.float().sum()
    found: Tensor = _MEAN(updates, share)
    return found


def stacked_median(updates: Tensor) -> Tensor:
    """The median of each coordinate: for an even number of updates the mean of the two middle ones.

    Fewer than n / 2 arbitrary (finite) updates cannot move it out of the range of the others. An infinity counts as
    a large number; a NaN makes its coordinate NaN.

    Args:
        updates: (n, d), n at least 1.

    Returns:
        (d,) in the updates' dtype.

    Raises:
        ValueError: no updates.
    """
    _check(updates)
    if plain(updates) or len(updates) > MOST:
        return reference.stacked_median(updates)
    found: Tensor = _TRIMMED(updates, (len(updates) - 1) // 2)
    return found


def trimmed_mean(updates: Tensor, trim: int) -> Tensor:
    """The mean of each coordinate without its `trim` smallest and `trim` largest values.

    Up to `trim` arbitrary (finite) updates cannot move it out of the range of the others. An infinity counts as a
    large number; a NaN makes its coordinate NaN.

    Args:
        updates: (n, d), n at least 1.
        trim: at least 0, with 2 · trim < n.

    Returns:
        (d,) in the updates' dtype, summed in float32 at least.

    Raises:
        ValueError: no updates, or nothing left of them.
    """
    _check(updates)
    if not 0 <= 2 * trim < len(updates):
        raise ValueError(f"trim={trim} of {len(updates)} updates: 0 <= 2·trim < n is wanted")
    if plain(updates) or len(updates) > MOST:
        return reference.trimmed_mean(updates, trim)
    found: Tensor = _TRIMMED(updates, trim)
    return found


def _check(updates: Tensor) -> None:
    if updates.ndim != 2 or len(updates) == 0 or not updates.is_floating_point():
        raise ValueError(
            f"updates {tuple(updates.shape)} {updates.dtype}: floating point (n, d), n at least 1"
        )


def _mean(updates: Tensor, share: Tensor) -> Tensor:
    from robust.cuda_ops.kernels import aggregation as kernels

    return kernels.weighted_sum(updates, share, skip=False).to(updates.dtype)


def _mean_fake(updates: Tensor, share: Tensor) -> Tensor:
    return updates.new_empty(updates.shape[1])


def _trimmed(updates: Tensor, trim: int) -> Tensor:
    from robust.cuda_ops.kernels import aggregation as kernels

    return kernels.trimmed_mean(updates, trim)


def _trimmed_fake(updates: Tensor, trim: int) -> Tensor:
    return updates.new_empty(updates.shape[1])


_MEAN = operator("stacked_mean", "(Tensor updates, Tensor share) -> Tensor", _mean, _mean_fake)
_TRIMMED = operator("trimmed_mean", "(Tensor updates, int trim) -> Tensor", _trimmed, _trimmed_fake)
