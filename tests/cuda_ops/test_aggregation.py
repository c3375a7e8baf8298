"""Mean, median and trimmed mean of stacked updates against numpy and scipy, and what outliers can do to them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from robust.cuda_ops import stacked_mean, stacked_median, trimmed_mean
from robust.cuda_ops.reference import aggregation as reference

COUNTS = [1, 2, 3, 4, 7, 16, 33, 128, 129]


def updates(n: int, d: int = 29) -> Tensor:
    """Updates with equal values among them, always the same."""
    return (torch.randn(n, d, generator=torch.Generator().manual_seed(n)) * 8).round() / 8


@pytest.mark.parametrize("n", COUNTS)
def test_mean_is_numpy_s_average(n: int) -> None:
    stacked, weights = updates(n), torch.arange(1.0, n + 1)
    assert np.allclose(stacked_mean(stacked).numpy(), stacked.double().numpy().mean(0), atol=1e-6)
    expected = np.average(stacked.double().numpy(), axis=0, weights=weights.numpy())
    assert np.allclose(stacked_mean(stacked, weights).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("n", COUNTS)
def test_median_is_numpy_s(n: int) -> None:
    assert np.array_equal(stacked_median(updates(n)).numpy(), np.median(updates(n).numpy(), axis=0))


@pytest.mark.parametrize(
    ("n", "trim"), [(1, 0), (3, 1), (4, 1), (7, 2), (16, 7), (33, 16), (128, 20), (129, 1)]
)
def test_trimmed_mean_is_scipy_s(n: int, trim: int) -> None:
    expected = stats.trim_mean(updates(n).double().numpy(), (trim + 0.5) / n if trim else 0, axis=0)
    assert np.allclose(trimmed_mean(updates(n), trim).numpy(), expected, atol=1e-6)


def test_no_trim_is_the_mean_and_full_trim_the_median() -> None:
    for n in (5, 6):
        assert torch.allclose(trimmed_mean(updates(n), 0), stacked_mean(updates(n)), atol=1e-6)
        assert torch.equal(trimmed_mean(updates(n), 2), stacked_median(updates(n)))


def test_a_minority_cannot_move_median_or_trimmed_mean_out_of_the_others_range() -> None:
    honest = updates(7)
    low, high = honest.amin(0), honest.amax(0)
    for bad in (1e30, -1e30, torch.inf, -torch.inf):
        stacked = torch.cat([honest, torch.full((3, 29), bad)])
        for result in (stacked_median(stacked), trimmed_mean(stacked, 3)):
            assert bool(((result >= low) & (result <= high)).all())
        assert not bool(((stacked_mean(stacked) >= low) & (stacked_mean(stacked) <= high)).any())


def test_the_order_of_the_updates_and_the_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    stacked = updates(9, 50)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    median, trimmed = stacked_median(stacked), trimmed_mean(stacked, 2)
    assert torch.equal(stacked_median(stacked[order]), median)
    assert torch.equal(trimmed_mean(stacked[order], 2), trimmed)
    monkeypatch.setattr(reference, "_CHUNK", 9 * 7)
    assert torch.equal(stacked_median(stacked), median)
    assert torch.allclose(trimmed_mean(stacked, 2), trimmed)


def test_a_nan_makes_its_coordinate_nan_and_no_other() -> None:
    stacked = updates(5, 6)
    stacked[3, 2] = torch.nan
    expected = [False, False, True, False, False, False]
    for result in (stacked_mean(stacked), stacked_median(stacked), trimmed_mean(stacked, 2)):
        assert result.isnan().tolist() == expected
    weights = torch.tensor([1.0, 1, 1, 0, 1])
    assert stacked_mean(stacked, weights).isnan().tolist() == expected


def test_infinities_are_large_numbers_and_opposite_ones_have_no_middle() -> None:
    inf = torch.inf
    stacked = torch.tensor([[inf, inf, -inf], [1.0, inf, inf], [2.0, 0.0, 0.0], [-inf, 1.0, 0.0]])
    assert stacked_median(stacked).tolist() == [1.5, inf, 0.0]
    assert trimmed_mean(stacked, 1).tolist() == [1.5, inf, 0.0]
    assert bool(stacked_median(torch.tensor([[inf], [-inf]])).isnan().all())


def test_the_middle_of_huge_and_of_tiny_numbers_is_exact() -> None:
    huge = torch.tensor([[3e38], [3.2e38]])
    assert float(stacked_median(huge)) == pytest.approx(3.1e38)
    tiny = torch.tensor([[1.4e-45]])
    assert torch.equal(stacked_median(tiny), tiny[0])


def test_dtypes_are_kept_and_no_coordinates_are_none() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        stacked = updates(3, 4).to(dtype)
        for result in (stacked_mean(stacked), stacked_mean(stacked, torch.ones(3)), trimmed_mean(stacked, 1)):
            assert result.dtype == dtype
        assert torch.equal(stacked_median(stacked), stacked.median(0).values)
    for result in (
        stacked_mean(updates(3, 0)),
        stacked_median(updates(3, 0)),
        trimmed_mean(updates(3, 0), 1),
    ):
        assert result.shape == (0,)


def test_nothing_to_aggregate_is_refused() -> None:
    with pytest.raises(ValueError, match="n at least 1"):
        stacked_median(torch.empty(0, 3))
    with pytest.raises(ValueError, match="floating point"):
        stacked_mean(torch.zeros(3, 3).long())
    with pytest.raises(ValueError, match="one per update"):
        stacked_mean(updates(3), torch.ones(2))
    for trim in (-1, 2, 3):
        with pytest.raises(ValueError, match="trim"):
            trimmed_mean(updates(4), trim)
