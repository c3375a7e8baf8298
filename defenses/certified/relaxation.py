"""Linear lower bounds carried backward through one step: what CROWN is made of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.defenses.certified.graph import Step


def through_affine(step: Step, a: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """⟨a, f(z)⟩ as ⟨a', z⟩ + constant, by the transpose of f, which is its vector-Jacobian product.

    Args:
        a: (N, S, …) coefficients of the step's value. shape: of one sample's input.

    Returns:
        a' (N, S, *shape) and the constant (N, S).
    """
    assert step.call is not None
    rows = a.flatten(0, 1)
    with torch.enable_grad():
        at = rows.new_zeros(len(rows), *shape).requires_grad_(True)
        value = step.call(at)
        (back,) = torch.autograd.grad(value, at, rows)
    shift = (rows * value.detach()).flatten(1).sum(1)
    return back.unflatten(0, a.shape[:2]), shift.unflatten(0, a.shape[:2])


def through_relu(a: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """⟨a, relu(z)⟩ ≥ ⟨a', z⟩ + constant for lower ≤ z ≤ upper (Zhang et al. 2018, table 2).

    A positive coefficient takes the line below, through 0 with the slope 0 or 1 that wastes less area; a negative one
    the chord above.
    """
    width = (upper - lower).clamp_min(1e-300)
    crosses = (lower < 0) & (upper > 0)
    above = torch.where(crosses, upper / width, (lower >= 0).to(a))
    below = torch.where(crosses, (upper > -lower).to(a), above)
    offset = torch.where(crosses, -lower * upper / width, torch.zeros_like(lower))
    positive, negative = a.clamp_min(0), a.clamp_max(0)
    back = positive * below[:, None] + negative * above[:, None]
    return back, (negative * offset[:, None]).flatten(2).sum(2)


def through_maxpool(step: Step, a: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """⟨a, maxpool(z)⟩ ≥ ⟨a', z⟩ + constant for lower ≤ z ≤ upper.

    From below the input with the largest lower bound stands for its window; from above the largest upper bound does,
    or that same input where it wins in any case.
    """
    pool = step.pool
    assert pool is not None
    given = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    least, winner = F.max_pool2d(lower, *given, return_indices=True)
    most = F.max_pool2d(upper, *given)
    wins = least >= _rivals(upper, winner, given)
    positive, negative = a.clamp_min(0), a.clamp_max(0)
    taken = positive + negative * wins[:, None]
    back = a.new_zeros(*a.shape[:3], lower[0, 0].numel())
    place = winner.flatten(2)[:, None].expand(-1, a.shape[1], -1, -1)
    back.scatter_add_(3, place, taken.flatten(3))
    fixed = torch.where(wins, torch.zeros_like(most), most)
    return back.unflatten(3, lower.shape[2:]), (negative * fixed[:, None]).flatten(2).sum(2)


def _rivals(upper: Tensor, winner: Tensor, given: Sequence[object]) -> Tensor:
    """The largest upper bound of each window without its winner; windows may overlap, so they are laid out."""
    kernel, stride, padding, dilation, _ = given
    if given[4]:  # with ceil_mode windows hang over the edge: no input is known to win
        return torch.full_like(winner, torch.inf, dtype=upper.dtype)
    n, channels, height, width = upper.shape
    pads = (padding, padding) if isinstance(padding, int) else tuple(padding)  # type: ignore[arg-type]
    places = torch.arange(height * width, device=upper.device, dtype=upper.dtype).view(1, 1, height, width)
    sides = (pads[1], pads[1], pads[0], pads[0])
    windows = [
        F.unfold(F.pad(values, sides, value=empty), kernel, dilation, 0, stride)  # type: ignore[arg-type]
        for values, empty in ((upper.reshape(n * channels, 1, height, width), -torch.inf), (places, -1.0))
    ]
    ours = windows[1] == winner.reshape(n * channels, 1, -1).to(upper.dtype)
    return windows[0].masked_fill(ours, -torch.inf).amax(1).view(winner.shape)
