"""Exact Euclidean projections on ball ∩ box, and shortest steps to a hyperplane inside the box.

All work on flat rows (B, n). Each solves a piecewise-linear equation in one variable per row; the concave ones by
Newton's method, which from the left converges monotonically in finitely many steps. Projections run at every step of
every attack: on a CPU a masked choice costs ten products, so saturation is written with `minimum` and `sign`. A row
that is solved stands still while others go on, so that its bits do not depend on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-30
_ROUNDS = 64
_INWARD = 4e-7  # of the radius: keeps the rounding of the sums inside the ball
_EXACT = 1e-6  # of the right-hand side: where an equation counts as solved in float32


def l2_scale(delta: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The factor s in (0, 1] with ‖clip(s · delta)‖₂ = eps, or 1 where the clipped row is shorter already.

    Args:
        delta: (B, n) wished displacement.
        room: (B, n) largest allowed |displacement| in delta's direction; its sign does not matter.
        eps: (B, 1) radius, infinite for none.

    Returns:
        (B, 1). The projection of x + delta on ball ∩ box is x + clip(s · delta) (KKT: one multiplier for the ball).
    """
    wish, cap = delta.square(), room.square()
    target = (eps * (1 - _INWARD)).square()
    u = (target / wish.sum(1, keepdim=True).clamp_min(_TINY)).clamp_max(1)
    for _ in range(_ROUNDS):
        taken = torch.minimum(wish * u, cap)
        short = target - taken.sum(1, keepdim=True)
        done = (short <= _EXACT * target) | (u >= 1)
        if bool(done.all()):
            break
        slope = (cap - taken).sign_().mul_(wish).sum(1, keepdim=True)
        # No slope: every coordinate is at its room, and the row is shorter than eps.
        following = torch.where(slope > 0, (u + short / slope.clamp_min(_TINY)).clamp_max(1), 1.0)
        u = torch.where(done, u, following)
    return u.sqrt()


def l1_shrink(delta: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The threshold t >= 0 with Σ min(max(|delta| - t, 0), room) = eps, or 0 where the sum is at most eps.

    This is the projection of Croce & Hein 2021 (arXiv:2103.01208, prop. 2.1) in one multiplier: bracketed Newton.
    Arguments as for `l2_scale`.
    """
    size, cap = delta.abs(), room.abs()
    target, tolerance = eps * (1 - _INWARD), eps * (_INWARD / 2)
    t, low, high = torch.zeros_like(eps), torch.zeros_like(eps), size.amax(1, keepdim=True)
    for _ in range(_ROUNDS):
        left = (size - t).clamp_min_(0)
        taken = torch.minimum(left, cap)
        over = taken.sum(1, keepdim=True) - target
        done = (over.abs() <= tolerance) | (high - low <= 2e-7 * high) | ((t == 0) & (over <= eps * _INWARD))
        if bool(done.all()):
            break
        slope = torch.minimum(left, cap - taken).sign_().sum(1, keepdim=True)
        low, high = torch.where(over > 0, t, low), torch.where(over > 0, high, t)
        newton = t + over / slope.clamp_min(1)
        valid = (newton > low) & (newton < high) & (slope > 0)
        t = torch.where(done, t, torch.where(valid, newton, (low + high) / 2))
    return t


def _reach(weight: Tensor, cap: Tensor, need: Tensor) -> Tensor:
    """The smallest λ >= 0 with Σ min(λ · weight, cap) = need; the largest number where the sum of caps is less."""
    most = torch.finfo(need.dtype).max
    lam = (need / weight.sum(1, keepdim=True).clamp_min(_TINY)).clamp_max(most)
    for _ in range(_ROUNDS):
        taken = torch.minimum(weight * lam, cap)
        short = need - taken.sum(1, keepdim=True)
        done = ~((short > _EXACT * need) & (lam < most))  # a row of NaN is done too
        if bool(done.all()):
            break
        slope = (cap - taken).sign_().mul_(weight).sum(1, keepdim=True)
        following = torch.where(slope > 0, (lam + short / slope.clamp_min(_TINY)).clamp_max(most), most)
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
    scale = size.amax(1, keepdim=True).clamp_min(_TINY)
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
    part = ((need - gain.cumsum(1) + gain) / steep.clamp_min(_TINY)).clamp_min_(0)
    return torch.zeros_like(x).scatter(1, order, torch.minimum(part, room)) * sign
