"""The trust-region solvers against scipy's optima, and in l0 against all choices of pixels."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robust.attacks.whitebox.trust_region import Problem, solve
from robust.errors import RobustError

optimize = pytest.importorskip("scipy.optimize")
ROWS, COUNT = 4, 8


def problem(radius: float, far: float = 0.05, seed: int = 0, channels: int = 1) -> Problem:
    """Random rows near their planes."""
    generator = torch.Generator().manual_seed(seed)
    x, other = torch.rand(2, ROWS, COUNT, generator=generator, dtype=torch.float64)
    normal = torch.randn(ROWS, COUNT, generator=generator, dtype=torch.float64)
    at = other - x
    shift = far * torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
    level = (normal * at).sum(1, keepdim=True) + shift
    return Problem(at, normal, level, -x, 1 - x, torch.full_like(level, radius), channels)


def optimum(norm: str, case: Problem, row: int) -> float:
    """The least norm by sequential quadratic programming, in variables (e, bounds on |e|)."""
    a, b, c, low, high, r = (
        part[row].numpy() for part in (case.at, case.normal, case.level, case.low, case.high, case.radius)
    )
    n = len(a)
    constraints: list[dict[str, Any]] = [
        {"type": "eq", "fun": lambda z: b @ z[:n] - c[0]},
        {"type": "ineq", "fun": lambda z: r[0] ** 2 - ((z[:n] - a) ** 2).sum()},
    ]
    start, box = a + b * (c[0] - a @ b) / (b @ b), list(zip(low, high, strict=True))
    goal: Any = lambda z: z @ z  # noqa: E731
    if norm != "l2":
        caps = 1 if norm == "linf" else n
        constraints.append({"type": "ineq", "fun": lambda z: z[n:] - z[:n]})
        constraints.append({"type": "ineq", "fun": lambda z: z[n:] + z[:n]})
        widest = np.abs(start).max(keepdims=True) if caps == 1 else np.abs(start)
        start, box = np.concatenate([start, widest]), box + [(0.0, 2.0)] * caps
        goal = lambda z: z[n:].sum()  # noqa: E731
    for ftol in (1e-9, 1e-8, 1e-7):  # a line search that meets rounding fails at the optimum itself
        options = {"maxiter": 500, "ftol": ftol}
        found = optimize.minimize(
            goal, start, bounds=box, constraints=constraints, method="SLSQP", options=options
        )
        if found.success:
            return float(found.fun**0.5 if norm == "l2" else found.fun)
    raise AssertionError(f"the reference found no optimum: {found.message}")


def length(norm: str, e: Tensor) -> Tensor:
    """(B,) the rows' norms."""
    return e.norm(p={"linf": float("inf"), "l2": 2.0, "l1": 1.0}[norm], dim=1)


def check_feasible(case: Problem, e: Tensor) -> None:
    """On the plane, in the trust region, in the box."""
    size = case.normal.norm(dim=1, keepdim=True)
    assert float((((case.normal * e).sum(1, keepdim=True) - case.level) / size).abs().max()) < 1e-7
    assert bool(((e - case.at).norm(dim=1, keepdim=True) <= case.radius * (1 + 1e-9)).all())
    assert bool(((e >= case.low) & (e <= case.high)).all())


@pytest.mark.parametrize("radius", [0.1, 0.3, 2.0])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_solution_is_the_optimum(norm: str, radius: float) -> None:
    case = problem(radius)
    e = solve(case, norm, exact=1e-9, slack=1e-7)
    check_feasible(case, e)
    best = torch.tensor([optimum(norm, case, row) for row in range(ROWS)], dtype=torch.float64)
    assert torch.allclose(length(norm, e), best, rtol=0, atol=1e-5)


@pytest.mark.parametrize("radius", [0.2, 0.4, 2.0])
@pytest.mark.parametrize("channels", [1, 2])
def test_fewest_pixels_are_near_the_best_of_all_choices(channels: int, radius: float) -> None:
    case = problem(radius, channels=channels)
    e = solve(case, "l0", exact=1e-9)
    check_feasible(case, e)
    changed = (e.view(ROWS, channels, -1) != 0).any(1).sum(1)
    for row in range(ROWS):
        assert int(changed[row]) <= fewest(case, row, channels) + 2


def fewest(case: Problem, row: int, channels: int) -> int:
    """The least number of pixels with which the plane is within the trust region, by trying all subsets."""
    pixels = COUNT // channels
    subsets = torch.tensor(list(product((0.0, 1.0), repeat=pixels)), dtype=torch.float64)
    keep = subsets[:, None].expand(-1, channels, -1).flatten(1)
    many = [
        part[row : row + 1] for part in (case.at, case.normal, case.level, case.low, case.high, case.radius)
    ]
    at, normal, level, low, high, radius = (part.expand(len(keep), -1) for part in many)
    left = radius.square() - (at * (1 - keep)).square().sum(1, keepdim=True)
    inner = Problem(at * keep, normal * keep, level, low * keep, high * keep, left.clamp_min(1e-12).sqrt())
    e = solve(inner, "l2", exact=1e-9)
    near = ((normal * e).sum(1, keepdim=True) - level).abs() < 1e-6
    fits = near & (left > 0) & ((e - at).norm(dim=1, keepdim=True) <= radius * (1 + 1e-9))
    return int(subsets.sum(1)[fits[:, 0]].min())


@pytest.mark.parametrize("norm", ["l2", "l1", "linf", "l0"])
def test_step_towards_a_plane_beyond_the_trust_region_is_as_long_as_that_allows(norm: str) -> None:
    case = problem(0.05, far=5.0)
    e = solve(case, norm)
    step = (e - case.at).norm(dim=1, keepdim=True)
    gap = (case.level - (case.normal * case.at).sum(1, keepdim=True)).abs()
    left = (case.level - (case.normal * e).sum(1, keepdim=True)).abs()
    assert bool((step <= case.radius * (1 + 1e-9)).all())
    assert bool(((e >= case.low) & (e <= case.high)).all())
    assert bool((left < gap).all())


@pytest.mark.parametrize("norm", ["l2", "l1", "linf", "l0"])
def test_rows_do_not_depend_on_their_batch(norm: str) -> None:
    case = problem(0.3)
    together = solve(case, norm)
    for row in range(ROWS):
        some = slice(row, row + 1)
        parts = (case.at, case.normal, case.level, case.low, case.high, case.radius)
        assert torch.equal(solve(Problem(*(part[some] for part in parts)), norm), together[some])


def test_unknown_norm_is_refused_in_one_line() -> None:
    with pytest.raises(RobustError, match="no trust region in l7"):
        solve(problem(0.1), "l7")
