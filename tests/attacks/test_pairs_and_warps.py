"""Saliency pairs against all pairs, and sampled images against turns and shifts that are exact."""

from __future__ import annotations

import pytest
import torch

from robust.attacks.blackbox.rotation_translation import make_grid, transformed
from robust.attacks.warp import pixel_grid, sample
from robust.attacks.whitebox.jsma import best_pair
from robust.attacks.whitebox.stadv import flowed, roughness


@pytest.mark.parametrize("slope", [-0.9, -0.3, 1.0])
def test_the_best_pair_is_the_best_of_all_pairs(slope: float) -> None:
    torch.manual_seed(0)
    u = torch.randn(6, 90)
    v = slope * u + (0.4 * torch.randn(6, 90) if slope < 1 else 0)
    free = torch.rand(6, 90) < 0.7
    pair, value = best_pair(u, v, free)
    product = (u[:, :, None] + u[:, None]).clamp_min(0) * (v[:, :, None] + v[:, None]).clamp_min(0)
    product = product * free[:, :, None] * free[:, None] * ~torch.eye(90, dtype=torch.bool)
    assert torch.equal(value, product.flatten(1).amax(1))
    assert torch.equal(product[torch.arange(6), pair[:, 0], pair[:, 1]], value)


def test_no_free_coordinate_is_no_pair() -> None:
    _, value = best_pair(torch.ones(2, 5), torch.ones(2, 5), torch.zeros(2, 5, dtype=torch.bool))
    assert torch.equal(value, torch.zeros(2))


def test_turns_and_shifts_of_whole_pixels_are_exact() -> None:
    x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    still, quarter, down = torch.tensor([[0.0, 0, 0], [90, 0, 0], [0, 2, -1]])[:, None].expand(-1, 2, 3)
    assert torch.equal(transformed(x, still, -1.0), x)
    assert torch.allclose(transformed(x, quarter, -1.0), x.rot90(1, (2, 3)), atol=1e-5)
    moved = transformed(x, down, -1.0)
    assert torch.equal(moved[:, :, 2:, :-1], x[:, :, :-2, 1:])
    assert bool((moved[:, :, :2] == -1).all())


def test_the_grid_holds_every_combination_once() -> None:
    grid = make_grid(torch.tensor([30.0, 3.0, 3.0]), 31, 5)
    assert len(grid.unique(dim=0)) == 31 * 5 * 5
    assert grid.abs().amax(0).tolist() == [30.0, 3.0, 3.0]


def test_a_flow_reads_where_it_points_and_its_slope_is_right() -> None:
    x = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(1)).double()
    right = torch.zeros(1, 2, 5, 6).double()
    assert torch.equal(flowed(x, right), x)
    right[:, 1] = 1
    assert torch.equal(flowed(x, right)[..., :-1], x[..., 1:])
    assert torch.equal(flowed(x, right)[..., -1], x[..., -1])
    assert float(roughness(right)) == pytest.approx(0, abs=0.02)
    flow = (0.3 + 0.2 * torch.rand(1, 2, 5, 6)).double().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda at: flowed(x, at), flow)


def test_a_place_on_the_images_edge_keeps_its_gradient() -> None:
    x = torch.rand(1, 1, 4, 5, generator=torch.Generator().manual_seed(0))
    down, across = (place[None].clone().requires_grad_(True) for place in pixel_grid(4, 5, x))
    (gradient,) = torch.autograd.grad(sample(x, down, across, None).sum(), across)
    expected = torch.cat([x[0, 0, :, 1:] - x[0, 0, :, :-1], torch.zeros(4, 1)], 1)
    torch.testing.assert_close(gradient[0], expected)
