"""Exact Euclidean projections on ball ∩ box, and shortest steps to a hyperplane inside the box.

All work on flat rows (B, n). Each solves a piecewise-linear equation in one variable per row; the concave ones by
Newton's method, which from the left converges monotonically in finitely many steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-30
_ROUNDS = 64


def l2_scale(delta: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The factor s in (0, 1] with ‖clip(s · delta)‖₂ = eps, or 1 where the clipped row is shorter already.

    Args:
        delta: (B, n) wished displacement.
        room: (B, n) largest allowed |displacement| in delta's direction, >= 0.
        eps: (B, 1) radius.

    Returns:
        (B, 1). The projection of x + delta on ball ∩ box is x + clip(s · delta) (KKT: one multiplier for the ball).
    """
    wish, cap = delta.square(), room.square()
    target = eps.square()
    free = wish.sum(1, keepdim=True)
    u = torch.where(free > target, target / free.clamp_min(_TINY), torch.ones_like(target))
    for _ in range(_ROUNDS):
        saturated = wish * u >= cap
        fixed = torch.where(saturated, cap, 0).sum(1, keepdim=True)
        slope = torch.where(saturated, 0, wish).sum(1, keepdim=True)
        following = torch.where(slope > 0, (target - fixed) / slope.clamp_min(_TINY), 1.0).clamp(0, 1)
        following = torch.maximum(following, u)
        if not bool((following > u * (1 + 1e-7)).any()):
            break
        u = following
    return u.sqrt()


def l1_shrink(delta: Tensor, room: Tensor, eps: Tensor) -> Tensor:
    """The threshold t >= 0 with Σ min(max(|delta| - t, 0), room) = eps, or 0 where the sum is at most eps.

    This is the projection of Croce & Hein 2021 (arXiv:2103.01208, prop. 2.1) in one multiplier: bracketed Newton.
    """
    size = delta.abs()

    def excess(t: Tensor) -> tuple[Tensor, Tensor]:
        left = size - t
        total = torch.minimum(left.clamp_min(0), room).sum(1, keepdim=True)
        slope = ((left > 0) & (left < room)).sum(1, keepdim=True)
        return total - eps, slope

    low, t = torch.zeros_like(eps), torch.zeros_like(eps)
    high = size.amax(1, keepdim=True)
    inside = excess(low)[0] <= 0
    for _ in range(_ROUNDS):
        over, slope = excess(t)
        if bool(((over.abs() <= 1e-6 * eps) | inside).all()):
            break
        low, high = torch.where(over > 0, t, low), torch.where(over > 0, high, t)
        newton = t + over / slope.clamp_min(1)
        valid = (newton > low) & (newton < high) & (slope > 0)
        t = torch.where(valid, newton, (low + high) / 2)
    return torch.where(inside, torch.zeros_like(t), t)


def _reach(weight: Tensor, cap: Tensor, need: Tensor) -> Tensor:
    """The smallest λ >= 0 with Σ min(λ · weight, cap) = need, or infinity where the sum of caps is less."""
    lam = torch.zeros_like(need)
    total = cap.sum(1, keepdim=True)
    for _ in range(_ROUNDS):
        saturated = weight * lam >= cap
        fixed = torch.where(saturated, cap, 0).sum(1, keepdim=True)
        slope = torch.where(saturated, 0, weight).sum(1, keepdim=True)
        following = torch.where(slope > 0, (need - fixed) / slope.clamp_min(_TINY), lam)
        following = torch.maximum(following, lam)
        if not bool((following > lam * (1 + 1e-6)).any()):
            break
        lam = following
    return torch.where(total < need, torch.full_like(lam, torch.inf), lam)


def _oriented(x: Tensor, w: Tensor, gap: Tensor, bounds: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Normal turned so that the gap is positive, the room along it, and the positive gap."""
    turn = torch.where(gap < 0, -1.0, 1.0)
    w = w * turn
    room = torch.where(w > 0, bounds[1] - x, x - bounds[0]).clamp_min(0)
    return w, torch.where(w == 0, 0, room), gap.abs()


def hyperplane_linf(x: Tensor, w: Tensor, gap: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The linf-shortest d with ⟨w, d⟩ = gap and x + d in the box; the box's corner where none reaches.

    Args:
        x, w: (B, n); gap: (B, 1).
    """
    w, room, need = _oriented(x, w, gap, bounds)
    size = w.abs()
    lam = _reach(size, size * room, need)
    return torch.minimum(lam, room) * w.sign()


def hyperplane_l2(x: Tensor, w: Tensor, gap: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The l2-shortest d with ⟨w, d⟩ = gap and x + d in the box; the box's corner where none reaches."""
    w, room, need = _oriented(x, w, gap, bounds)
    size = w.abs()
    scale = size.amax(1, keepdim=True).clamp_min(_TINY)
    size = size / scale  # squares of tiny gradients would vanish in float32
    lam = _reach(size.square(), size * room, need / scale)
    return torch.minimum(torch.where(size > 0, lam * size, 0).nan_to_num(posinf=torch.inf), room) * w.sign()


def hyperplane_l1(x: Tensor, w: Tensor, gap: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The l1-shortest d with ⟨w, d⟩ = gap and x + d in the box: the steepest coordinates first, each to the box."""
    w, room, need = _oriented(x, w, gap, bounds)
    size, order = w.abs().sort(1, descending=True)
    gain = size * room.gather(1, order)
    before = gain.cumsum(1) - gain
    part = ((need - before) / size.clamp_min(_TINY)).clamp_min(0)
    step = torch.minimum(part, room.gather(1, order))
    return torch.zeros_like(x).scatter(1, order, step) * w.sign()
