"""Statistics over stacked updates (median, trimmed mean: Yin et al. 2018, arXiv:1803.01498) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust.cuda_ops.reference.images import working

_CHUNK = 1 << 17  # numbers sorted at a time: they and their sorted copy stay in a CPU's cache


def stacked_mean(updates: Tensor, weights: Tensor | None = None) -> Tensor:
    """See `robust.cuda_ops.stacked_mean`."""
    if weights is None:
        return working(updates).mean(0).to(updates.dtype)
    rows = working(updates)
    share = working(weights).to(rows.dtype)
    return ((share / share.sum()) @ rows).to(updates.dtype)


def stacked_median(updates: Tensor) -> Tensor:
    """See `robust.cuda_ops.stacked_median`."""
    n = len(updates)

    def middle(ordered: Tensor) -> Tensor:
        low = ordered[:, (n - 1) // 2]
        return low if n % 2 else low * 0.5 + ordered[:, n // 2] * 0.5

    return _over_sorted(updates, middle)


def trimmed_mean(updates: Tensor, trim: int) -> Tensor:
    """See `robust.cuda_ops.trimmed_mean`."""
    return _over_sorted(updates, lambda ordered: ordered[:, trim : len(updates) - trim].mean(1))


def _over_sorted(updates: Tensor, statistic: Callable[[Tensor], Tensor]) -> Tensor:
    """`statistic` of each coordinate's values in ascending order, (m, n) -> (m,); NaN where one of them is NaN."""
    n, d = updates.shape
    out = torch.empty(d, dtype=updates.dtype, device=updates.device)
    whole = torch.compiler.is_compiling() or updates.is_cuda
    wide = max(d, 1) if whole else max(1, _CHUNK // n)
    for left in range(0, d, wide):
        ordered = working(updates[:, left : left + wide]).t().contiguous().sort(1).values
        value = statistic(ordered)
        out[left : left + wide] = torch.where(ordered[:, -1].isnan(), torch.nan, value)  # NaN sorts last
    return out
