"""Threats: what is inside, what `project` promises at every edge, random points, steepest directions, errors."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from robust.errors import ThreatError, UnknownName
from robust.rng import Draws
from robust.threat import L0, L1, L2, SLACK, Bounds, Linf, Patch, Threat, make_threat

BOX: Bounds = (0.0, 1.0)
NORMS = ("linf", "l2", "l1")


def images(n: int = 6, shape: tuple[int, ...] = (3, 5, 4), bounds: Bounds = BOX, seed: int = 0) -> Tensor:
    """Points of the box, a third of the coordinates on its edges."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *shape, generator=generator)
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.33, x.round(), x)
    return (bounds[0] + (bounds[1] - bounds[0]) * x).clamp(*bounds)


def noise(x: Tensor, scale: float, seed: int = 1) -> Tensor:
    """Gaussian noise of the shape of x."""
    return scale * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def draws(n: int, seed: int = 0, first: int = 0, step: int = 0) -> Draws:
    """A source for n rows."""
    return Draws(seed, "test", torch.arange(first, first + n), step)


# ---------------------------------------------------------------------------------------------------- inside, distance


def test_distances_are_the_norms_in_float64() -> None:
    x = images().double()
    z = x + noise(x, 0.3)
    delta = (z - x).flatten(1)
    for threat, order in ((Linf(1), math.inf), (L2(1), 2.0), (L1(1), 1.0)):
        found = threat.distance(z, x)
        assert found.dtype == torch.float64
        torch.testing.assert_close(
            found, torch.linalg.vector_norm(delta, ord=order, dim=1), rtol=1e-12, atol=0
        )


@pytest.mark.parametrize("norm", NORMS)
def test_inside_ends_at_eps_plus_the_slack(norm: str) -> None:
    x = torch.full((1, 1, 2, 2), 0.5, dtype=torch.float64)
    for over, expected in ((0.9 * SLACK, True), (1.1 * SLACK, False)):
        z = x.clone()
        z[0, 0, 0, 0] += 0.25 + over
        assert bool(make_threat(norm, 0.25).inside(z, x, BOX)) is expected


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 1.0000001, -1e-7])
@pytest.mark.parametrize(
    "threat", [Linf(9), L2(), L1(9), L0(9), Patch(height=5, width=4)], ids=lambda t: t.norm
)
def test_a_point_out_of_the_box_is_not_inside(threat: Threat, wrong: float) -> None:
    x = torch.ones(2, 1, 5, 4) * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1)
    z = x.clone()
    z[:, 0, 0, 0] = wrong
    assert not bool(threat.inside(z, x, BOX).any())
    assert bool(threat.inside(x, x, BOX).all())


# --------------------------------------------------------------------------------------------------------- projections

HOSTILE = (1e-8, 0.1, 30.0, 1e6, 1e30)


@pytest.mark.parametrize("bounds", [BOX, (0.0, 255.0), (-1.0, 1.0)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_a_projected_point_is_inside_whatever_it_was(norm: str, bounds: Bounds) -> None:
    x = images(bounds=bounds)
    for eps in (1e-12, 1e-6, 8 / 255, 0.5, 8.0, 1e4, 1e30):
        threat = make_threat(norm, eps)
        for scale in HOSTILE:
            z = x + noise(x, scale)
            assert bool(threat.inside(threat.project(z, x, bounds), x, bounds).all()), (
                f"eps {eps}, noise {scale}"
            )
        z = x + noise(x, 0.5)
        z[0, 0], z[1, 1], z[2, 2], z[3] = torch.nan, torch.inf, -torch.inf, torch.nan
        p = threat.project(z, x, bounds)
        assert bool(threat.inside(p, x, bounds).all()), f"eps {eps}, not finite"
        assert torch.equal(p[3], x[3]), "NaN is no point: it projects to the centre"
        assert torch.equal(p[0, 0], x[0, 0])


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8.0), ("l2", 128.0), ("l1", 3000.0)])
def test_rounding_inward_costs_next_to_nothing(norm: str, eps: float) -> None:
    """In the box of bytes a float32 is off by 7e-6, and the ball is still used to within a ten-thousandth."""
    bounds, x = (0.0, 255.0), images(20, (3, 9, 9), (0.0, 255.0)).clamp(60, 200)
    threat = make_threat(norm, eps)
    p = threat.project(x + noise(x, 300), x, bounds)
    distance = threat.distance(p, x)
    assert bool((distance <= eps + SLACK).all())
    assert bool((distance >= eps * (1 - 1e-4)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_projecting_twice_is_projecting_once(norm: str) -> None:
    x = images(20, (3, 9, 9))
    for eps, scale in ((0.3, 0.05), (3.0, 0.5), (1e-3, 10.0)):
        threat = make_threat(norm, eps)
        once = threat.project(x + noise(x, scale), x, BOX)
        torch.testing.assert_close(threat.project(once, x, BOX), once, rtol=0, atol=2e-6 * eps + 6e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_a_point_inside_stays(norm: str) -> None:
    x = images()
    z = (x + noise(x, 0.01)).clamp(*BOX)
    threat = make_threat(norm, float(make_threat(norm, 1).distance(z, x).max()) * 1.001)
    torch.testing.assert_close(threat.project(z, x, BOX), z, rtol=0, atol=0 if norm != "l1" else 6e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_an_unchanged_coordinate_stays_exactly(norm: str) -> None:
    x = images()
    mask = images(seed=7) > 0.5
    z = torch.where(mask, x + noise(x, 3), x)
    assert torch.equal(make_threat(norm, 0.4).project(z, x, BOX)[~mask], x[~mask])


def test_l1_leaves_small_changes_at_exactly_zero() -> None:
    x = images(4, (3, 16, 16))
    p = L1(1.0).project(x + noise(x, 0.05), x, BOX)
    changed = (p != x).flatten(1).sum(1)
    assert bool((changed < 200).all()), "a sparse projection is sparse to the bit"


@pytest.mark.parametrize("norm", NORMS)
def test_one_eps_per_sample_is_each_sample_s_own(norm: str) -> None:
    x = images(4)
    z = x + noise(x, 1)
    eps = torch.tensor([0.05, 0.5, math.inf, 2.0])
    threat = make_threat(norm, eps)
    p = threat.project(z, x, BOX)
    for row in range(4):
        alone = make_threat(norm, float(eps[row])).project(z[row : row + 1], x[row : row + 1], BOX)
        torch.testing.assert_close(p[row : row + 1], alone, rtol=0, atol=1e-7)
    assert bool(threat.inside(p, x, BOX).all())
    inside = threat.inside(make_threat(norm, 0.5).project(z, x, BOX), x, BOX)
    assert inside.tolist() == [False, True, True, True], "row 0 is out of its own, smaller ball"


def test_unbounded_projects_to_the_box() -> None:
    x = images()
    z = x + noise(x, 2)
    assert torch.equal(L2().project(z, x, BOX), z.clamp(*BOX))
    assert not L2().bounded
    assert L2(0.5).bounded


def test_empty_batches_project_to_empty_batches() -> None:
    empty = torch.zeros(0, 3, 5, 4)
    for threat in (Linf(0.1), L2(0.1), L1(0.1), L0(1), Patch()):
        assert threat.project(empty, empty, BOX).shape == empty.shape
        assert threat.inside(empty, empty, BOX).shape == (0,)


# ---------------------------------------------------------------------------------------------------- pixels, patch


def test_l0_projects_to_the_nearest_point_among_all_choices_of_pixels() -> None:
    x = images(5, (3, 2, 3))
    z = x + noise(x, 0.8)
    for eps in (1.0, 2.9, 4.0):
        p = L0(eps).project(z, x, BOX)
        assert bool(L0(eps).inside(p, x, BOX).all())
        best = torch.full((5,), torch.inf)
        for pixels in combinations(range(6), int(eps)):
            mask = torch.zeros(6, dtype=torch.bool)
            mask[list(pixels)] = True
            choice = torch.where(mask.view(2, 3), z.clamp(*BOX), x)
            best = best.minimum((choice - z).flatten(1).norm(dim=1))
        torch.testing.assert_close((p - z).flatten(1).norm(dim=1), best)


def test_l0_counts_pixels_and_not_channels() -> None:
    x = torch.full((2, 3, 4, 4), 0.5)
    z = x.clone()
    z[0, :, 1, 2] = 1.0
    z[1, 0, 0, 0] = z[1, 2, 3, 3] = 0.5000001
    assert L0(1).distance(z, x).tolist() == [1.0, 2.0]
    assert L0(1).inside(z, x, BOX).tolist() == [True, False]
    assert not L0(0.5).project(z, x, BOX).ne(x).any(), "less than one pixel is none"


def test_a_patch_projects_to_the_best_of_all_places() -> None:
    x = images(4, (3, 6, 5))
    z = x + noise(x, 0.8)
    threat = Patch(height=2, width=3)
    p = threat.project(z, x, BOX)
    assert bool(threat.inside(p, x, BOX).all())
    best = torch.full((4,), torch.inf)
    for top in range(5):
        for left in range(3):
            choice = x.clone()
            window = (slice(None), slice(None), slice(top, top + 2), slice(left, left + 3))
            choice[window] = z[window].clamp(*BOX)
            best = best.minimum((choice - z).flatten(1).norm(dim=1))
    torch.testing.assert_close((p - z).flatten(1).norm(dim=1), best)


def test_a_patch_measures_the_enclosing_rectangle() -> None:
    x = torch.full((4, 1, 8, 8), 0.5)
    z = x.clone()
    z[1, 0, 2, 3] = z[1, 0, 3, 5] = 1.0  # 2 × 3
    z[2, 0, 0, 0] = z[2, 0, 4, 0] = 1.0  # 5 × 1
    z[3, 0, 1, 1] = torch.nan
    threat = Patch(height=2, width=3)
    assert threat.distance(z, x).tolist() == [0.0, 1.0, 2.5, 0.5]
    assert threat.inside(z, x, BOX).tolist() == [True, True, False, False]
    whole = Patch(height=99, width=99)
    assert torch.equal(whole.project(z[:3] + 1, x[:3], BOX), (z[:3] + 1).clamp(*BOX))


# -------------------------------------------------------------------------------------------------------------- random

EVERY = [
    Linf(0.1),
    L2(0.6),
    L1(2.0),
    L0(3),
    Patch(height=2, width=2),
    L2(),
    Linf(torch.tensor([0.1, math.inf] * 3)),
]


@pytest.mark.parametrize("bounds", [BOX, (-1.0, 1.0), (0.0, 255.0)], ids=str)
@pytest.mark.parametrize("threat", EVERY, ids=lambda t: f"{t.norm}-{t.bounded}")
def test_random_points_are_inside_and_keyed(threat: Threat, bounds: Bounds) -> None:
    x = images(bounds=bounds)
    p = threat.random(x, bounds, draws(6))
    assert bool(threat.inside(p, x, bounds).all())
    assert bool((p != x).flatten(1).any(1).all())
    assert torch.equal(threat.random(x, bounds, draws(6)), p)
    same = x[:1].expand_as(x)
    rows = threat.random(same, bounds, draws(6))
    others = [
        threat.random(same, bounds, source)
        for source in (draws(6, first=6), draws(6, seed=1), draws(6, step=1))
    ]
    assert len({tuple(row.flatten().tolist()) for point in (rows, *others) for row in point}) == 24
    some = torch.tensor([4, 1])
    part = threat.take(some).random(x[some], bounds, Draws(0, "test", some))
    torch.testing.assert_close(part, p[some], rtol=0, atol=2e-6 * (bounds[1] - bounds[0]))


@pytest.mark.parametrize("norm", NORMS)
def test_random_points_fill_the_ball_evenly(norm: str) -> None:
    """In a ball of n dimensions the n-th power of the relative distance is uniform; other scales are told apart."""
    x = torch.full((1500, 1, 2, 2), 0.5)
    threat = make_threat(norm, 0.2)
    p = threat.random(x, BOX, draws(1500))
    share = (threat.distance(p, x) / 0.2).pow(4).numpy()
    assert kstest(share, "uniform").pvalue > 0.01
    assert kstest((share**0.25 * 2 / 3) ** 4, "uniform").pvalue < 1e-6
    assert abs(float((p - x).mean())) < 0.005
    assert bool((threat.distance(p, x) > 0).all())


# ------------------------------------------------------------------------------------------------------ steepest, dual


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e20])
@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_direction_has_length_one_and_gains_the_dual_norm(norm: str, scale: float) -> None:
    gradient = noise(images(), scale)
    threat = make_threat(norm, 1.0)
    step = threat.steepest(gradient, keep=0.0)  # for l1: the best single coordinate
    torch.testing.assert_close(
        threat.distance(step, torch.zeros_like(step)), torch.ones(6, dtype=torch.float64)
    )
    gain = (gradient.double() * step.double()).flatten(1).sum(1)
    order = {"linf": 1.0, "l2": 2.0, "l1": math.inf}[norm]
    exact = torch.linalg.vector_norm(gradient.double().flatten(1), ord=order, dim=1)
    torch.testing.assert_close(gain, exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(threat.dual(gradient).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_a_vanished_gradient_has_no_direction(norm: str) -> None:
    step = make_threat(norm, 1.0).steepest(torch.zeros(2, 1, 3, 3))
    assert torch.equal(step, torch.zeros_like(step))


def test_the_l1_step_spreads_over_the_fraction_asked_for() -> None:
    gradient = noise(images(3, (1, 10, 10)), 1)
    for keep, expected in ((0.05, [5] * 3), (torch.tensor([0.0, 0.2, 1.0]), [1, 20, 100])):
        step = L1(1).steepest(gradient, keep=keep)
        assert (step != 0).flatten(1).sum(1).tolist() == expected
        torch.testing.assert_close(step.abs().flatten(1).sum(1), torch.ones(3))
        largest = gradient.abs().masked_fill(step != 0, 0).flatten(1).amax(1)
        chosen = gradient.abs().masked_fill(step == 0, math.inf).flatten(1).amin(1)
        assert bool((largest <= chosen).all())
        assert bool((step * gradient >= 0).all())


# ------------------------------------------------------------------------------------------------------- values, errors


def test_take_gives_rows_their_own_radii() -> None:
    threat = L2(torch.tensor([0.1, 0.2, 0.3]))
    rows = torch.tensor([2, 0])
    assert threat.take(rows) == L2(torch.tensor([0.3, 0.1]))
    assert L2(0.5).take(rows) == L2(0.5)
    assert threat.with_eps(0.7) == L2(0.7)


def test_threats_are_values() -> None:
    assert Linf(0.5) == Linf(0.5) != Linf(0.25)
    assert len({Linf(0.5), Linf(0.5), L2(0.5), L2(torch.tensor([0.5])), L2(torch.tensor([0.5, 0.5]))}) == 4
    assert Patch(height=3) != Patch(height=4)
    assert Linf(0.5) != 0.5
    assert Linf(torch.tensor([0.5, 0.25])).describe() == {"norm": "linf", "eps": [0.5, 0.25]}
    assert Patch(height=3, width=4).describe() == {"norm": "patch", "eps": 1.0, "height": 3, "width": 4}
    assert make_threat("l0", 3) == L0(3)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1", "l0"])
@pytest.mark.parametrize(
    "eps", [-1.0, 0.0, math.nan, torch.tensor([0.1, -1.0]), torch.tensor([]), torch.ones(2, 1)]
)
def test_an_impossible_radius_is_one_line(norm: str, eps: float | Tensor) -> None:
    with pytest.raises(ThreatError, match=r"^eps.* is no radius; it must be|^eps has shape") as error:
        make_threat(norm, eps)
    assert "\n" not in str(error.value)


def test_a_radius_wider_than_the_box_is_a_forgotten_division() -> None:
    with pytest.raises(ThreatError, match=r"^eps=8 is outside the box \[0, 1\]; did you mean 8/255\?$"):
        Linf(8).check(BOX)
    with pytest.raises(ThreatError, match=r"^eps=300 is outside the box \[0, 255\]$"):
        Linf(300).check((0.0, 255.0))
    for threat, bounds in (
        (Linf(8), (0.0, 255.0)),
        (Linf(1), BOX),
        (Linf(2), (-1.0, 1.0)),
        (L2(8), BOX),
        (Linf(), BOX),
    ):
        threat.check(bounds)


def test_an_unknown_norm_is_one_line() -> None:
    with pytest.raises(UnknownName, match=r"^unknown norm 'l3'; did you mean .*l[0-2]"):
        make_threat("l3", 1.0)
    x = torch.zeros(1, 1, 2, 2)
    with pytest.raises(UnknownName, match="no projection onto hyperplanes in l0"):
        L0(1).to_hyperplane(x, x, torch.ones(1), BOX)
    with pytest.raises(ThreatError, match=r"^a patch of 0 × 3 pixels is empty"):
        Patch(height=0, width=3)
