"""Exact Euclidean projections on ball ∩ box, and shortest steps to a hyperplane inside the box.

All work on flat rows (B, n). Each solves a piecewise-linear equation in one variable per row; the concave ones by
Newton's method, which from the left converges monotonically in finitely many steps. Projections run at every step of
every attack: on a CPU a masked choice costs ten products, so saturation is written with `minimum` and `sign`. A row
that is solved stands still while others go on, so that its bits do not depend on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust.cuda_ops.reference.projections import EXACT, ROUNDS, TINY, l1_shrink, l2_scale

__all__ = ["hyperplane_l1", "hyperplane_l2", "hyperplane_linf", "l1_shrink", "l2_scale"]


def _reach(weight: Tensor, cap: Tensor, need: Tensor) -> Tensor:
    """The smallest λ >= 0 with Σ min(λ · weight, cap) = need; the largest number where the sum of caps is less."""
    most = torch.finfo(need.dtype).max
    lam = (need / weight.sum(1, keepdim=True).clamp_min(TINY)).clamp_max(most)
    for _ in range(ROUNDS):
        taken = torch.minimum(weight * lam, cap)
        short = need - taken.sum(1, keepdim=True)
        done = ~((short > EXACT * need) & (lam < most))  # a row of NaN is done too
        if bool(done.all()):
            break
        slope = (cap - taken).sign_().mul_(weight).sum(1, keepdim=True)
        following = torch.where(slope > 0, (lam + short / slope.clamp_min(TINY)).clamp_max(most), most)
        lam = torch.where(done, lam, following)
    return lam


def _oriented(
    x: Tensor, w: Tensor, gap: Tensor, bounds: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The direction's signs, |w| over its largest entry, the room along it (none where w is 0), and |gap| so scaled.

    Scaled, because the squares of tiny gradients would vanish in float32.
    """
    sign = w.sign() * torch.where(gap < 0, -1.0, 1.0)
    size = w.abs()
    scale = size.amax(1, keepdim=True).clamp_min(TINY)
    width = 2 * (bounds[1] - bounds[0])
    room = ((x + width * sign).clamp_(*bounds) - x).abs_()
    return sign, size / scale, room, gap.abs() / scale


def hyperplane_linf(x: Tensor, w: Tensor, gap: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The linf-shortest d with ⟨w, d⟩ = gap and x + d in the box; the box's corner where none reaches.

    Args:
        x, w: (B, n); gap: (B, 1).
    """
    sign, size, room, need = _oriented(x, w, gap, bounds)
    return torch.minimum(_reach(size, size * room, need), room) * sign


def hyperplane_l2(x: Tensor, w: Tensor, gap: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The l2-shortest d with ⟨w, d⟩ = gap and x + d in the box; the box's corner where none reaches."""
    sign, size, room, need = _oriented(x, w, gap, bounds)
    return torch.minimum(_reach(size.square(), size * room, need) * size, room) * sign


def hyperplane_l1(x: Tensor, w: Tensor, gap: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The l1-shortest d with ⟨w, d⟩ = gap and x + d in the box: the steepest coordinates first, each to the box."""
    sign, size, room, need = _oriented(x, w, gap, bounds)
    steep, order = size.sort(1, descending=True)
    room = room.gather(1, order)
    gain = steep * room
    part = ((need - gain.cumsum(1) + gain) / steep.clamp_min(TINY)).clamp_min_(0)
    return torch.zeros_like(x).scatter(1, order, torch.minimum(part, room)) * sign
