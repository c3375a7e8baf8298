"""Exact Euclidean projections on ball ∩ box, and the steps' use of them.

All work on flat rows (B, n). Each solves a piecewise-linear equation in one variable per row by Newton's method, which
from the left converges monotonically in finitely many steps. Projections run at every step of every attack: on a CPU
a masked choice costs ten products, so saturation is written with `minimum` and `sign`, and the rounds share one
buffer. A row that is solved stands still while others go on, so that its bits do not depend on the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

TINY = 1e-30
ROUNDS = 64
INWARD = 4e-7  # of the radius: keeps the rounding of the sums inside the ball
EXACT = 1e-6  # of the right-hand side: where an equation counts as solved in float32


def l2_scale(delta: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The factor s in (0, 1] with ‖clip(s · delta)‖₂ = eps, or 1 where the clipped row is shorter already.

    Args:
        delta: (B, n) wished displacement.
        room: (B, n) largest allowed |displacement| in delta's direction; its sign does not matter.
        eps: (B, 1) radius, infinite for none.

    Returns:
        (B, 1). The projection of x + delta on ball ∩ box is x + clip(s · delta) (KKT: one multiplier for the ball).
    """
    return _scale(delta.square(), room.square(), eps)


def _scale(wish: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """`l2_scale` of squares."""
    target = (eps * (1 - INWARD)).square()
    u = (target / wish.sum(1, keepdim=True).clamp_min(TINY)).clamp_max(1)
    for _ in range(ROUNDS):
        taken = (wish * u).clamp_max_(cap)
        short = target - taken.sum(1, keepdim=True)
        done = (short <= EXACT * target) | (u >= 1)
        if bool(done.all()):
            break
        slope = taken.sub_(cap).neg_().sign_().mul_(wish).sum(1, keepdim=True)
        # No slope: every coordinate is at its room, and the row is shorter than eps.
        following = torch.where(slope > 0, (u + short / slope.clamp_min(TINY)).clamp_max(1), 1.0)
        u = torch.where(done, u, following)
    return u.sqrt()


def l1_shrink(delta: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The threshold t >= 0 with Σ min(max(|delta| - t, 0), room) = eps, or 0 where the sum is at most eps.

    This is the projection of Croce & Hein 2021 (arXiv:2103.01208, prop. 2.1) in one multiplier: bracketed Newton.
    Arguments as for `l2_scale`.
    """
    return _shrink(delta.abs(), room.abs(), eps)


def _shrink(size: Tensor, cap: Tensor, eps: Tensor) -> Tensor:
    """`l1_shrink` of absolute values."""
    target, tolerance = eps * (1 - INWARD), eps * (INWARD / 2)
    t, low, high = torch.zeros_like(eps), torch.zeros_like(eps), size.amax(1, keepdim=True)
    for _ in range(ROUNDS):
        left = (size - t).clamp_min_(0)
        taken = torch.minimum(left, cap)
        over = taken.sum(1, keepdim=True) - target
        done = (over.abs() <= tolerance) | (high - low <= 2e-7 * high) | ((t == 0) & (over <= eps * INWARD))
        if bool(done.all()):
            break
        slope = left.clamp_max_(taken.sub_(cap).neg_()).sign_().sum(1, keepdim=True)
        low, high = torch.where(over > 0, t, low), torch.where(over > 0, high, t)
        newton = t + over / slope.clamp_min(1)
        valid = (newton > low) & (newton < high) & (slope > 0)
        t = torch.where(done, t, torch.where(valid, newton, (low + high) / 2))
    return t


def onto_linf(moved: Tensor, x: Tensor, eps: Tensor, low: float, high: float) -> Tensor:
    """|moved − x| <= eps in the box [low, high], in place: `moved` belongs to the caller's step.

    Args:
        moved, x: (B, …) of one shape; eps: (B, 1, …).
    """
    edge = x - eps
    moved.clamp_min_(edge)
    torch.add(x, eps, out=edge)
    return moved.clamp_max_(edge).clamp_(low, high)


def onto_l2(moved: Tensor, x: Tensor, eps: Tensor, low: float, high: float) -> Tensor:
    """‖moved − x‖₂ <= eps in the box [low, high], in place, up to rounding.

    Args:
        moved, x: (B, n); eps: (B, 1).
    """
    room = moved.clamp(low, high).sub_(x).square_()
    scale = _scale((moved - x).square_(), room, eps)
    return torch.lerp(x, moved, scale, out=moved).clamp_(low, high)


def onto_l1(moved: Tensor, x: Tensor, eps: Tensor, low: float, high: float) -> Tensor:
    """‖moved − x‖₁ <= eps in the box [low, high], in place, up to rounding; arguments as for `onto_l2`."""
    room = moved.clamp(low, high).sub_(x).abs_()
    delta = moved.sub_(x)
    size = delta.abs()
    size.sub_(_shrink(size, room, eps)).clamp_min_(0)  # exactly 0 where it is not changed
    return size.copysign_(delta).add_(x).clamp_(low, high)
