"""Smallest perturbations on a hyperplane, within a trust region and the box, for many rows at once.

The problem of one row: min ‖e‖_p such that ⟨b, e⟩ = c, ‖e − a‖₂ ≤ r and low ≤ e ≤ high, where e is the perturbation
of the clean point and a the present one. Its Lagrangian falls apart into coordinates: e = shrink(a + κ b), and the
norm decides what shrinks: a factor in l2, a soft threshold in l1, a cap in linf, and l0 resets whole pixels. The
multiplier κ puts e on the hyperplane; the strength of the shrinking, with which ‖e − a‖₂ grows, makes use of the trust
region. All in float64; a row stands still once it is solved, so that its bits do not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust.errors import RobustError

_ROUNDS = 60
_FAR = 1e30
_STRONGEST = 1 - 1e-6
_WIDER = 8  # by which the search for κ grows its steps before it has a bracket


@dataclass(frozen=True)
class Problem:
    """B rows of n coordinates.

    Attributes:
        at: (B, n) a, the present perturbation; normal: (B, n) b; level: (B, 1) c.
        low, high: (B, n) what the box leaves, low ≤ 0 ≤ high.
        radius: (B, 1) r.
        channels: coordinates of a pixel, which l0 counts as one; a row is (channels, pixels).
        reach: (B, 1) the cap of linf at strength 0.
        rank: (B, n) the share of all pixels that l0 resets before a coordinate's pixel.
    """

    at: Tensor
    normal: Tensor
    level: Tensor
    low: Tensor
    high: Tensor
    radius: Tensor
    channels: int = 1
    reach: Tensor | float = torch.inf
    rank: Tensor | None = None


Shrink = Callable[[Problem, Tensor, Tensor], tuple[Tensor, Tensor]]


def solve(problem: Problem, norm: str, exact: float = 1e-3, slack: float = 0.05) -> Tensor:
    """(B, n) e of least norm; where hyperplane and trust region do not meet, a step of length r towards the plane.

    Args:
        problem: the rows, in float64.
        norm: "l0", "l1", "l2" or "linf"; l0 resets pixels in the order of their worth, which is near the optimum.
        exact: of the radius: how near to the hyperplane e is; a tenth of it is the strength's precision.
        slack: of the radius: how much of it may be left unused.
    """
    if norm not in SHRINKS:
        raise RobustError(f"no trust region in {norm}; known are {', '.join(SHRINKS)}")
    shrink, problem = SHRINKS[norm], _scaled(problem)
    zero = torch.zeros_like(problem.radius)
    nearest, _, kappa = _on_plane(problem, _shrink_l2, zero, zero, exact)
    away = _length(nearest - problem.at)
    rank = _ranked(problem, kappa) if norm == "l0" else None
    problem = replace(problem, reach=nearest.abs().amax(1, keepdim=True), rank=rank)
    short = problem.at + (nearest - problem.at) * (problem.radius / away.clamp_min(1e-300)).clamp_max(1)
    weak, strong = zero, zero + _STRONGEST
    below, above = away - problem.radius, zero + torch.inf
    best, solved, strength = short, below > 0, strong
    for count in range(_ROUNDS):
        e, reached, kappa_new = _on_plane(problem, shrink, strength, kappa, exact)
        kappa = torch.where(solved, kappa, kappa_new)
        beyond = torch.where(reached, _length(e - problem.at) - problem.radius, torch.inf)
        fits = ~solved & (beyond <= 0)
        best = torch.where(fits, e, best)
        weak, below = torch.where(fits, strength, weak), torch.where(fits, beyond, below)
        fails = ~solved & ~fits
        strong, above = torch.where(fails, strength, strong), torch.where(fails, beyond, above)
        solved = (
            solved | (fits & (beyond >= -slack * problem.radius)) | (strong - weak <= exact / 10 * (1 - weak))
        )
        if bool(solved.all()):
            break
        secant = weak + (strong - weak) * (below / (below - above)).nan_to_num(0.5)
        halfway = above.isinf() | (count % 2 == 0)
        strength = torch.where(halfway, (weak + strong) / 2, secant)
    return best


def _length(rows: Tensor) -> Tensor:
    length: Tensor = rows.norm(dim=1, keepdim=True)
    return length


def _scaled(problem: Problem) -> Problem:
    """The same rows with a normal of length one, and a level that the box can reach."""
    size = _length(problem.normal).clamp_min(1e-300)
    normal = problem.normal / size
    most = torch.maximum(normal * problem.low, normal * problem.high).sum(1, keepdim=True)
    least = torch.minimum(normal * problem.low, normal * problem.high).sum(1, keepdim=True)
    level = (problem.level / size).maximum(least).minimum(most)
    return replace(problem, normal=normal, level=level)


def _on_plane(
    problem: Problem, shrink: Shrink, strength: Tensor, kappa: Tensor, exact: float
) -> tuple[Tensor, Tensor, Tensor]:
    """e = shrink(a + κ b) with ⟨b, e⟩ = c, whether there is one, and κ; bracketed Newton from `kappa`.

    ⟨b, e⟩ is continuous and piecewise linear in κ, and never falls.
    """
    tolerance = exact * problem.radius

    def lacks(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, moves = shrink(problem, at, strength)
        return e, moves, problem.level - (problem.normal * e).sum(1, keepdim=True)

    e, moves, gap = lacks(kappa)
    end = lacks(torch.where(gap > 0, _FAR, -_FAR))[2]
    reached = (gap.abs() <= tolerance) | (end * gap <= 0) | (end.abs() <= tolerance)
    low, high, pace = torch.full_like(kappa, -_FAR), torch.full_like(kappa, _FAR), problem.radius
    done = ~reached | (gap.abs() <= tolerance)
    for count in range(_ROUNDS):
        if bool(done.all()):
            break
        low, high = torch.where(gap > 0, kappa, low), torch.where(gap < 0, kappa, high)
        open_end = (low == -_FAR) | (high == _FAR)
        slope = (problem.normal.square() * moves).sum(1, keepdim=True)
        newton = kappa + gap / slope.clamp_min(1e-300)
        valid = (slope > 0) & (newton > low) & (newton < high) & (open_end | (count % 3 < 2))
        other = torch.where(open_end, kappa + pace * gap.sign(), (low + high) / 2)
        pace = torch.where(valid | ~open_end, pace, pace * _WIDER)
        kappa = torch.where(done, kappa, torch.where(valid, newton, other))
        e, moves, gap = lacks(kappa)
        done = done | (gap.abs() <= tolerance)
    return e, reached, kappa


def _odds(strength: Tensor, scale: Tensor) -> Tensor:
    return scale * strength / (1 - strength)


def _clip(problem: Problem, e: Tensor) -> tuple[Tensor, Tensor]:
    """e in the box, and which coordinates are free to move with κ."""
    return e.clamp(problem.low, problem.high), (e > problem.low) & (e < problem.high)


def _shrink_l2(problem: Problem, kappa: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    return _clip(problem, (1 - strength) * problem.at + kappa * problem.normal)


def _shrink_l1(problem: Problem, kappa: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    threshold = _odds(strength, problem.radius / problem.at.shape[1] ** 0.5)
    wish = problem.at + kappa * problem.normal
    left = wish.abs() - threshold
    e, moves = _clip(problem, left.clamp_min(0) * wish.sign())
    return e, moves & (left > 0)


def _shrink_l0(problem: Problem, kappa: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    assert problem.rank is not None
    e, moves = _clip(problem, problem.at + kappa * problem.normal)
    kept = problem.rank >= strength
    return e * kept, moves & kept


def _ranked(problem: Problem, kappa: Tensor) -> Tensor:
    """(B, n) the place of each coordinate's pixel, as a share in [0, 1), by what its change is worth at κ."""
    wish = problem.at + kappa * problem.normal
    e = _clip(problem, wish)[0]
    worth = (e * (2 * wish - e)).unflatten(1, (problem.channels, -1)).sum(1)
    place = worth.argsort(dim=1, stable=True).argsort(dim=1).double() / worth.shape[1]
    rank: Tensor = place[:, None].expand(-1, problem.channels, -1).flatten(1)
    return rank


def _shrink_linf(problem: Problem, kappa: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
    cap = problem.reach * (1 - strength)
    capped = replace(problem, low=problem.low.maximum(-cap), high=problem.high.minimum(cap))
    return _clip(capped, problem.at + kappa * problem.normal)


SHRINKS: dict[str, Shrink] = {"l2": _shrink_l2, "l1": _shrink_l1, "l0": _shrink_l0, "linf": _shrink_linf}
