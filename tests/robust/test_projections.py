"""Projections and shortest steps, against solvers that know nothing of how they are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.optimize import linprog, minimize
from torch import Tensor

from robust.threat import L1, L2, Bounds, Linf, Threat, make_threat

Vector = NDArray[np.float64]
BOX: Bounds = (0.0, 1.0)
CASES = settings(max_examples=60, deadline=None, derandomize=True)
SMALL = 5

centres = arrays(np.float32, SMALL, elements=st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0]))
points = arrays(np.float32, SMALL, elements=st.floats(-1.5, 2.5, width=32))
normals = arrays(
    np.float32, SMALL, elements=st.floats(-2, 2, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)
)
radii = st.floats(0.01, 4.0)


def as_row(values: NDArray[np.float32] | Vector) -> Tensor:
    """(1, 1, 1, n) float32."""
    return torch.tensor(values, dtype=torch.float32).view(1, 1, 1, -1)


def as_vector(row: Tensor) -> Vector:
    """(n,) float64."""
    return row.double().flatten().numpy()


def nearest_l2(z: Vector, x: Vector, eps: float) -> Vector:
    """Sequential quadratic programming on the definition."""
    found = minimize(
        lambda p: float(((p - z) ** 2).sum()),
        x,
        jac=lambda p: 2 * (p - z),
        bounds=[BOX] * len(x),
        constraints={
            "type": "ineq",
            "fun": lambda p: eps**2 - ((p - x) ** 2).sum(),
            "jac": lambda p: -2 * (p - x),
        },
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return np.asarray(found.x)


def nearest_l1(z: Vector, x: Vector, eps: float) -> Vector:
    """The same with p = x + up − down, where the l1 norm is linear."""
    n = len(x)
    sides = np.concatenate([np.eye(n), -np.eye(n)], axis=1)

    def slope(v: Vector) -> Vector:
        return np.asarray(2 * sides.T @ (x + sides @ v - z))

    found = minimize(
        lambda v: float(((x + sides @ v - z) ** 2).sum()),
        np.zeros(2 * n),
        jac=slope,
        bounds=[(0, 1 - c) for c in x] + [(0, c) for c in x],
        constraints={"type": "ineq", "fun": lambda v: eps - v.sum(), "jac": lambda v: -np.ones(2 * n)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    return np.asarray(x + sides @ found.x)


def nearest_linf(z: Vector, x: Vector, eps: float) -> Vector:
    """The ball is a box too."""
    return np.clip(z, np.maximum(x - eps, 0), np.minimum(x + eps, 1))


ORACLES = {"linf": nearest_linf, "l2": nearest_l2, "l1": nearest_l1}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@CASES
@given(x=centres, z=points, eps=radii)
def test_projection_is_the_nearest_point_of_ball_and_box(
    norm: str, x: NDArray[np.float32], z: NDArray[np.float32], eps: float
) -> None:
    threat = make_threat(norm, eps)
    found = threat.project(as_row(z), as_row(x), BOX)
    expected = ORACLES[norm](z.astype(np.float64), x.astype(np.float64), eps)
    assert bool(threat.inside(found, as_row(x), BOX))
    excess = np.linalg.norm(as_vector(found) - z) - np.linalg.norm(expected - z)
    assert abs(excess) < 5e-6, "another point of ball and box is nearer"
    np.testing.assert_allclose(as_vector(found), expected, atol=1e-4 if norm != "linf" else 1e-6)


def best_gain_l1(g: Vector, up: Vector, down: Vector, eps: float) -> float:
    """max ⟨g, d⟩ over ball ∩ box: a fractional knapsack."""
    room = np.where(g > 0, up, down)
    gain, left = 0.0, eps
    for i in np.argsort(-np.abs(g)):
        step = min(room[i], left)
        gain, left = gain + abs(g[i]) * step, left - step
    return gain


def best_gain_l2(g: Vector, up: Vector, down: Vector, eps: float) -> float:
    """max ⟨g, d⟩ over ball ∩ box, bounded by weak duality: any multiplier gives an upper bound."""
    room = np.where(g > 0, up, down)
    bounds = []
    for multiplier in np.geomspace(1e-3, 1e3, 4000):
        d = np.minimum(np.abs(g) / multiplier, room)
        bounds.append((np.abs(g) * d).sum() - multiplier / 2 * (d**2).sum() + multiplier / 2 * eps**2)
    return float(min(bounds))


@pytest.mark.parametrize(("norm", "eps", "spread"), [("l2", 0.5, 0.02), ("l2", 3.0, 0.3), ("l1", 12.0, 0.05)])
def test_projection_is_optimal_on_images(norm: str, eps: float, spread: float) -> None:
    """⟨z − p, c − p⟩ <= 0 for every c in ball ∩ box; the best c is found by other means than the projection."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 32, 32, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.2, x.round(), x)
    z = x + spread * torch.randn(x.shape, generator=generator)
    threat = make_threat(norm, eps)
    p = threat.project(z, x, BOX)
    assert bool(threat.inside(p, x, BOX).all())
    assert float((threat.distance(p, x) / eps).min()) > 1 - 1e-5, "it is rounded inward by more than rounding"
    best = {"l1": best_gain_l1, "l2": best_gain_l2}[norm]
    for row in range(len(x)):
        centre, found = as_vector(x[row]), as_vector(p[row])
        away = as_vector(z[row]) - found
        gap = best(away, 1 - centre, centre, eps) - float(away @ (found - centre))
        assert gap < 3e-5 * np.linalg.norm(away) * eps, "squared distance to the true projection"


def shortest(norm: str, x: Vector, w: Vector, gap: float) -> float | None:
    """Length of the shortest d with ⟨w, d⟩ = gap and x + d in the box; None where there is none."""
    n, box = len(x), [(-c, 1 - c) for c in x]
    feasible = linprog(np.zeros(n), A_eq=w[None], b_eq=[gap], bounds=box)
    if feasible.status != 0:
        return None
    if norm == "l2":
        constraint = {"type": "eq", "fun": lambda d: w @ d - gap, "jac": lambda d: w}
        return float(
            min(
                np.linalg.norm(
                    minimize(
                        lambda d: float(d @ d),
                        begin,
                        jac=lambda d: 2 * d,
                        bounds=box,
                        constraints=constraint,
                        method="SLSQP",
                        options={"ftol": 1e-14, "maxiter": 500},
                    ).x
                )
                for begin in (feasible.x, feasible.x / 2)
            )
        )
    program: dict[str, Any]
    if norm == "l1":
        program = {
            "c": np.ones(2 * n),
            "A_eq": np.concatenate([w, -w])[None],
            "bounds": [(0, 1 - c) for c in x] + [(0, c) for c in x],
        }
    else:
        eye, ones = np.eye(n), np.ones((n, 1))
        program = {
            "c": np.r_[np.zeros(n), 1],
            "A_eq": np.r_[w, 0][None],
            "A_ub": np.block([[eye, -ones], [-eye, -ones]]),
            "b_ub": np.zeros(2 * n),
            "bounds": [*box, (0, None)],
        }
    found = linprog(b_eq=[gap], **program)
    return None if found.fun is None else float(found.fun)  # out of reach by a rounding error


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@CASES
@given(x=centres, w=normals, gap=st.floats(-2.5, 2.5).filter(lambda v: abs(v) > 1e-3))
def test_step_to_a_hyperplane_is_the_shortest_in_the_box(
    norm: str, x: NDArray[np.float32], w: NDArray[np.float32], gap: float
) -> None:
    row, normal = as_row(x), as_row(w)
    d = as_vector(make_threat(norm, 1.0).to_hyperplane(row, normal, torch.tensor([gap]), BOX))
    moved = x + d
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    expected = shortest(norm, x.astype(np.float64), w.astype(np.float64), gap)
    reach = float(w.astype(np.float64) @ d)
    if expected is None:
        corner = np.where(w * gap > 0, 1.0, 0.0)
        np.testing.assert_allclose(moved[w != 0], corner[w != 0], atol=1e-6)
        assert not d[w == 0].any()
    else:
        assert reach == pytest.approx(gap, abs=1e-5)
        length = float(make_threat(norm, 1.0).distance(as_row(moved), row))
        assert length == pytest.approx(expected, abs=1e-5, rel=1e-4)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_step_to_a_hyperplane_far_from_the_box_has_the_closed_form(norm: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, w = torch.full((3, 1, 4, 5), 0.5), torch.randn(3, 1, 4, 5, generator=generator)
    gap = torch.tensor([0.1, -0.2, 0.05])
    threat = make_threat(norm, 1.0)
    d = threat.to_hyperplane(x, w, gap, BOX)
    torch.testing.assert_close((d * w).flatten(1).sum(1), gap, rtol=1e-5, atol=1e-7)
    length = gap.abs() / threat.dual(w)
    torch.testing.assert_close(threat.distance(x + d, x).float(), length, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12])
def test_step_to_a_hyperplane_does_not_depend_on_the_scale_of_the_gradient(norm: str, scale: float) -> None:
    generator = torch.Generator().manual_seed(2)
    x, w = torch.rand(4, 1, 4, 5, generator=generator), torch.randn(4, 1, 4, 5, generator=generator)
    gap = torch.tensor([0.3, -0.4, 2.0, -1.0])
    threat = make_threat(norm, 1.0)
    scaled = threat.to_hyperplane(x, w * scale, gap * scale, BOX)
    torch.testing.assert_close(scaled, threat.to_hyperplane(x, w, gap, BOX), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_step_to_a_hyperplane_at_the_edges(norm: str) -> None:
    x = torch.tensor([[0.5, 1.0, 0.0, 0.2]]).view(1, 1, 1, 4).repeat(4, 1, 1, 1)
    w = torch.tensor([1.0, 1.0, -1.0, 0.0]).view(1, 1, 1, 4).repeat(4, 1, 1, 1)
    w[3] = 0
    gap = torch.tensor([0.0, 0.25, 9.0, 1.0])
    d = make_threat(norm, 1.0).to_hyperplane(x, w, gap, BOX).flatten(1)
    assert not d[0].any(), "no gap is no step"
    torch.testing.assert_close(d[1], torch.tensor([0.25, 0, 0, 0]))
    torch.testing.assert_close(d[2], torch.tensor([0.5, 0, 0, 0]))
    assert not d[3].any(), "no gradient is no step"
    nan = make_threat(norm, 1.0).to_hyperplane(x[:2], w[:2], torch.tensor([torch.nan, 0.25]), BOX).flatten(1)
    torch.testing.assert_close(nan[1], d[1])


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.7), L1(2.0)], ids=lambda t: t.norm)
def test_a_sample_is_projected_alike_alone_and_in_a_batch(threat: Threat) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(9, 3, 8, 8, generator=generator)
    z = x + torch.logspace(-3, 1, 9).view(-1, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    whole = threat.project(z, x, BOX)
    shuffled = torch.tensor([4, 0, 8, 1, 3, 2, 7, 5, 6])
    assert torch.equal(threat.project(z[shuffled], x[shuffled], BOX), whole[shuffled])
    others = z.clone()
    others[1:] = x[1:] + 50 * (z[1:] - x[1:])
    assert torch.equal(threat.project(others, x, BOX)[0], whole[0])
    for row in range(len(x)):
        alone = threat.project(z[row : row + 1], x[row : row + 1], BOX)
        torch.testing.assert_close(alone[0], whole[row], rtol=0, atol=1e-6)
