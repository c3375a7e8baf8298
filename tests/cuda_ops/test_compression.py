"""Quantisation is unbiased and within a step, sparsification loses nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from robust.cuda_ops import dequantise, quantise, sparsify

KEY = (2**32 - 5, 12)


def restored(x: Tensor, bits: int, step: int = 0) -> Tensor:
    """There and back."""
    codes, scale = quantise(x, bits, KEY, step)
    return dequantise(codes, scale, bits, x.shape)


def numbers(count: int) -> Tensor:
    """Numbers of many sizes, always the same."""
    return torch.randn(count, generator=torch.Generator().manual_seed(count)) * torch.logspace(-3, 3, count)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 2, 3, 1023, 1024, 1025, 5001])
def test_restored_numbers_are_within_a_step_and_lengths_are_as_promised(bits: int, count: int) -> None:
    x = numbers(count)
    codes, scale = quantise(x, bits, KEY, 3)
    assert codes.dtype == torch.uint8
    assert (len(codes), len(scale)) == (math.ceil(count * bits / 8), math.ceil(count / 1024))
    step = scale.repeat_interleave(1024)[:count]
    assert bool(((dequantise(codes, scale, bits, (count,)) - x).abs() <= step * (1 + 1e-5)).all())
    for part, own in zip(x.split(1024), scale, strict=True):
        assert float(own) == pytest.approx(float(part.abs().max()) / (2 ** (bits - 1) - 1), rel=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_steps_are_exact_whatever_is_drawn(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    x = torch.arange(-top, top + 1) * 0.125
    assert all(torch.equal(restored(x, bits, step), x) for step in range(20))
    assert torch.equal(restored(torch.zeros(7), bits), torch.zeros(7))


def test_two_codes_lie_in_a_byte_the_first_one_low() -> None:
    codes, scale = quantise(torch.tensor([7.0, -7.0, 3.0]), 4, KEY, 0)
    assert codes.tolist() == [15 + (1 << 4), 11 + (8 << 4)]
    assert scale.tolist() == [1.0]
    assert quantise(torch.tensor([127.0, -127.0, 0.0]), 8, KEY, 0)[0].tolist() == [255, 1, 128]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_mean_over_the_draws_is_x_and_neither_two_thirds_nor_three_halves_of_it(bits: int) -> None:
    x = torch.linspace(-1, 1, 999)
    rounds = 200
    drawn = torch.stack([restored(x, bits, step) for step in range(rounds)]).double()
    step = 1 / (2 ** (bits - 1) - 1)
    fraction = (x.double() / step) % 1
    deviation = step * (fraction * (1 - fraction)).sqrt()
    often = deviation > 0.2 * step  # rounded either way often enough for a normal limit
    for scale in (1.0, 2 / 3, 3 / 2):
        z = (drawn.mean(0) - scale * x) / deviation * rounds**0.5
        p = stats.kstest(z[often].numpy(), "norm").pvalue
        assert p > 1e-3 if scale == 1 else p < 1e-9, scale
    for scale in (1.0, 2 / 3, 3 / 2):  # and its standard deviation is that of rounding up with p = fraction
        ratio = float((drawn.var(0)[often] / (scale * deviation[often]) ** 2).mean())
        assert (abs(ratio - 1) < 0.02) == (scale == 1)


def test_draws_are_keyed_by_key_step_and_client() -> None:
    x = numbers(1000)
    codes = quantise(x, 8, KEY, 0)[0]
    assert torch.equal(codes, quantise(x, 8, KEY, 0)[0])
    others = [quantise(x, 8, KEY, 1), quantise(x, 8, (1, 2), 0), quantise(x, 8, KEY, 0, identity=1)]
    assert all(not torch.equal(codes, other) for other, _ in others)


@pytest.mark.parametrize("size", [1e-45, 3e-44, 1e-38, 3.4e38])
def test_the_smallest_and_the_largest_numbers_keep_the_promise(size: float) -> None:
    x = torch.tensor([1.0, -0.3, 0.77, 0.0]) * size
    codes, scale = quantise(x, 8, KEY, 0)
    assert bool(((dequantise(codes, scale, 8, (4,)).double() - x).abs() <= scale.double() * (1 + 1e-5)).all())


def test_shapes_dtypes_and_nothing() -> None:
    x = numbers(24).view(2, 3, 4)
    assert restored(x, 4).shape == (2, 3, 4)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(restored(x.to(dtype), 8), restored(x.to(dtype).float(), 8))
    for bits in (4, 8):
        codes, scale = quantise(torch.empty(0, 3), bits, KEY, 0)
        assert len(codes) == len(scale) == 0
        assert dequantise(codes, scale, bits, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [0, 1500])
def test_what_is_not_finite_has_no_code(bad: float, place: int) -> None:
    x = torch.ones(1501)
    x[place] = bad
    with pytest.raises(ValueError, match="finite"):
        quantise(x, 8, KEY, 0)


def test_wrong_bits_keys_and_lengths_are_refused() -> None:
    x = torch.ones(10)
    codes, scale = quantise(x, 4, KEY, 0)
    refused: list[tuple[Any, ...]] = [
        (codes, scale, 8, (10,)),
        (codes, scale, 4, (11,)),
        (codes, scale, 3, (10,)),
    ]
    refused += [(codes.int(), scale, 4, (10,)), (codes, scale[:0], 4, (10,))]
    for arguments in refused:
        with pytest.raises(ValueError, match="wanted"):
            dequantise(*arguments)
    with pytest.raises(ValueError, match="bits=5"):
        quantise(x, 5, KEY, 0)
    with pytest.raises(ValueError, match="key"):
        quantise(x, 4, (-1, 0), 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_kept_and_what_stays_add_up_bit_for_bit(dtype: torch.dtype) -> None:
    update, residual = numbers(501).to(dtype), (numbers(501).flip(0) * 0.3).to(dtype)
    before = update.clone(), residual.clone()
    kept, left = sparsify(update, residual, 1.0)
    total = update + residual
    assert torch.equal(kept + left, total)
    assert torch.equal(kept != 0, total.abs() >= 1)
    assert bool(((kept == 0) | (left == 0)).all())
    assert torch.equal(torch.stack((update, residual)), torch.stack(before))
    assert 0 < int((kept != 0).sum()) < 501


def test_over_the_rounds_nothing_is_lost() -> None:
    rounds = (
        torch.randn(20, 100, generator=torch.Generator().manual_seed(0)) * 64
    ).round() / 64  # sums are exact
    residual, sent = torch.zeros(100), torch.zeros(100)
    for update in rounds:
        kept, residual = sparsify(update, residual, 2.5)
        sent += kept
    assert torch.equal(sent + residual, rounds.sum(0))
    assert bool((residual.abs() < 2.5).all())


def test_thresholds_at_the_edge_as_tensors_and_at_the_ends() -> None:
    update = torch.tensor([[1.0, -1.0, 0.5, 0.0]])
    none = torch.zeros(1, 4)
    assert sparsify(update, none, 1.0)[0].tolist() == [[1.0, -1.0, 0.0, 0.0]]
    assert torch.equal(sparsify(update, none, torch.tensor(0.5))[0], torch.tensor([[1.0, -1.0, 0.5, 0.0]]))
    assert torch.equal(sparsify(update, none, 0.0)[0], update)
    assert torch.equal(sparsify(update, none, math.inf)[1], update)
    assert sparsify(none[:0], none[:0], 1.0)[0].shape == (0, 4)


def test_a_nan_is_sent_and_poisons_no_residual() -> None:
    kept, left = sparsify(torch.tensor([torch.nan, torch.inf, 0.1]), torch.zeros(3), 1.0)
    assert kept[0].isnan()
    assert kept[1] == torch.inf
    assert torch.equal(left, torch.tensor([0.0, 0.0, 0.1]))


def test_sparsify_refuses_what_does_not_fit() -> None:
    one = torch.ones(2)
    refused: list[tuple[Any, ...]] = [(one, torch.ones(3), 1.0), (one, one.double(), 1.0), (one, one, -1.0)]
    for arguments in [*refused, (one, one, math.nan), (one, one, torch.ones(2))]:
        with pytest.raises(ValueError, match=r"alike|wanted"):
            sparsify(*arguments)
