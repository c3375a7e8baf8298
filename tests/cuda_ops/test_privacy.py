"""Per-sample norms, clipped sums and noisy updates: closed forms, torch's SGD, and the noise's distribution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robust.cuda_ops import clip_accumulate, noise_update, per_sample_norm
from robust.cuda_ops.reference import privacy as reference

KEY = (3, 2**32 - 1)


def gradients(rows: int, count: int) -> Tensor:
    """Gradients of many lengths, always the same."""
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, count, generator=generator) * torch.rand(rows, 1, generator=generator) * 3


def test_norms_are_the_square_roots_of_the_sums_of_squares_over_all_parameters() -> None:
    assert per_sample_norm(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist() == [5.0, 0.0]
    parts = [torch.full((2, 3, 1), 2.0), torch.full((2,), 2.0), torch.empty(2, 0)]
    assert per_sample_norm(parts).tolist() == [4.0, 4.0]
    assert per_sample_norm(torch.tensor([[torch.nan, 1], [torch.inf, 1]])).tolist() == pytest.approx(
        [torch.nan, torch.inf], nan_ok=True
    )


def test_norms_are_float32_at_least() -> None:
    ones = torch.ones(1, 4099)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        norm = per_sample_norm(ones.to(dtype))
        assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert float(norm) == pytest.approx(4099**0.5, rel=1e-6)
    assert per_sample_norm(torch.empty(0, 5)).shape == (0,)


def test_the_clipped_sum_is_the_loop_over_the_rows() -> None:
    grads = gradients(37, 53)
    summed, norms = clip_accumulate(grads, None, 2.0)
    expected = sum((row * min(1.0, 2.0 / float(row.norm())) for row in grads), torch.zeros(53))
    assert torch.allclose(summed, expected, atol=1e-5)
    assert torch.allclose(norms, grads.norm(dim=1))
    again, given = clip_accumulate(grads, norms, 2.0)
    assert torch.equal(again, summed)
    assert torch.equal(given, norms)


def test_given_norms_over_more_parameters_scale_this_one() -> None:
    summed, _ = clip_accumulate(torch.ones(2, 3), torch.tensor([4.0, 0.5]), 1.0)
    assert summed.tolist() == [1.25] * 3


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_contributes_nothing_and_is_reported(bad: float) -> None:
    grads = gradients(5, 7)
    grads[2, 3] = bad
    summed, norms = clip_accumulate(grads, None, 1.0)
    rest, _ = clip_accumulate(grads[[0, 1, 3, 4]], None, 1.0)
    assert torch.allclose(summed, rest, atol=1e-6)
    assert norms.isfinite().tolist() == [True, True, False, True, True]


def test_one_row_more_changes_the_sum_by_at_most_max_norm() -> None:
    grads = gradients(30, 11) * torch.logspace(-6, 12, 30)[:, None]
    for row in range(30):
        alone, _ = clip_accumulate(grads[row : row + 1].double(), None, 0.7)
        assert float(alone.norm()) <= 0.7 * (1 + 1e-12)
        short = float(grads[row].double().norm()) <= 0.7
        assert torch.equal(alone, grads[row].double()) == short


def test_zero_rows_empty_batches_and_half_numbers() -> None:
    assert clip_accumulate(torch.zeros(3, 4), None, 1.0)[0].tolist() == [0.0] * 4
    assert clip_accumulate(torch.zeros(0, 4), None, 1.0)[0].tolist() == [0.0] * 4
    assert clip_accumulate(torch.zeros(3, 0), None, 1.0)[0].shape == (0,)
    half, norms = clip_accumulate(torch.full((3000, 2), 1.0).half(), None, 10.0)
    assert half.dtype == norms.dtype == torch.float32
    assert half.tolist() == [3000.0] * 2


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan"), float("inf")])
def test_clipping_refuses_a_bound_that_is_none(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        clip_accumulate(torch.ones(2, 3), None, max_norm)


def test_shapes_that_do_not_fit_are_refused() -> None:
    for grads, norms in ((torch.ones(2), None), (torch.ones(2, 3), torch.ones(3))):
        with pytest.raises(ValueError, match=r"\(B, n\)"):
            clip_accumulate(grads, norms, 1.0)
    for parts in ([], [torch.ones(2, 3), torch.ones(3, 3)], [torch.tensor(1.0)]):
        with pytest.raises(ValueError, match="one B"):
            per_sample_norm(parts)


@pytest.mark.parametrize("factor", [0.0, 0.9])
def test_without_noise_the_update_is_torch_s_sgd(factor: float) -> None:
    weight = nn.Parameter(gradients(3, 5).clone())
    optimiser = torch.optim.SGD([weight], lr=0.3, momentum=factor)
    mine, momentum = weight.detach().clone(), None
    for step in range(4):
        summed = gradients(3, 5) * (step - 1.5)
        weight.grad = summed / 8
        optimiser.step()
        before = mine.clone()
        new, momentum = noise_update(mine, summed, momentum, 0.3, factor, 0.0, 8.0, KEY, step)
        assert torch.equal(mine, before)
        mine = new
        assert torch.allclose(mine, weight.detach(), atol=1e-6)
        assert (momentum is None) == (factor == 0)


@pytest.mark.parametrize("scale", [1.0, 2 / 3, 3 / 2])
def test_the_noise_on_the_sum_has_this_standard_deviation_and_no_other(scale: float) -> None:
    zero = torch.zeros(7, 3001)
    moved, _ = noise_update(zero, zero, None, 0.5, 0.0, 3.0, 6.0, KEY, 1)
    p = stats.kstest(moved.flatten().numpy(), "norm", args=(0, 0.5 * 3.0 / 6.0 * scale)).pvalue
    assert p > 1e-3 if scale == 1 else p < 1e-9


def test_the_noise_is_keyed_by_key_step_and_parameter() -> None:
    zero = torch.zeros(4, 5)

    def noise(key: tuple[int, int] = KEY, step: int = 0, identity: int = 0) -> Tensor:
        return noise_update(zero, zero, None, 1.0, 0.0, 1.0, 1.0, key, step, identity)[0]

    first = noise()
    assert torch.equal(first, noise())
    others = [noise(key=(4, 5)), noise(step=1), noise(identity=1), noise(identity=2**32)]
    assert all(not torch.isclose(first, other).any() for other in others)
    same = torch.empty(1, 20)
    reference.fill_normals(same, torch.tensor([0]), torch.tensor([0]), KEY)
    assert torch.allclose(first.flatten(), -same[0])


def test_the_update_keeps_shapes_and_dtypes_and_takes_nothing() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        param = torch.ones(2, 3, 1, dtype=dtype)
        moved, momentum = noise_update(param, param, param, 0.1, 0.5, 0.1, 4.0, KEY, 0)
        assert momentum is not None
        assert moved.shape == momentum.shape == param.shape
        assert moved.dtype == momentum.dtype == dtype
    empty = torch.empty(0)
    assert noise_update(empty, empty, None, 0.1, 0.0, 0.1, 4.0, KEY, 0)[0].shape == (0,)


@pytest.mark.parametrize(
    "change",
    [
        {"noise_std": -1.0},
        {"batch_size": 0.0},
        {"summed": torch.ones(3)},
        {"momentum": torch.ones(3)},
        {"key": (1,)},
    ],
)
def test_the_update_refuses_what_it_cannot_mean(change: dict[str, Any]) -> None:
    two = torch.ones(2)
    good: dict[str, Any] = {"param": two, "summed": two, "momentum": two, "lr": 0.1, "momentum_factor": 0.5}
    good |= {"noise_std": 1.0, "batch_size": 2.0, "key": KEY, "step": 0}
    noise_update(**good)
    with pytest.raises(ValueError, match=r"."):
        noise_update(**(good | change))
