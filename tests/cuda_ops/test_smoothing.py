"""Noise batches and vote counts: keyed as `robust.rng` keys, distributed as they say, counted as numpy counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from robust.cuda_ops import noise_batch, vote_counts
from robust.cuda_ops.reference import smoothing as reference
from robust.rng import Draws, _key

KEY = _key(7, "smoothing")
FAR = torch.tensor([0, 1, 2**31, 2**32 + 5, -1, 2**40 + 3])


def draws(step: int) -> Draws:
    """The source that the noise of the rows `FAR` must come from."""
    return Draws(7, "smoothing", FAR, step)


def test_words_are_those_of_draws_bit_for_bit() -> None:
    step = torch.full_like(FAR, 2**31 + 9)
    words = reference.words(FAR, step, KEY, torch.arange(7))
    assert torch.equal(torch.stack(words, dim=-1).flatten(1)[:, :26], draws(2**31 + 9).bits(26))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 257])
def test_noise_is_that_of_draws_and_copy_k_is_step_k(count: int) -> None:
    noise = noise_batch(torch.zeros(6, count), 1.0, FAR, 11, KEY, copies=3).view(6, 3, count)
    for k in range(3):
        assert torch.allclose(noise[:, k], draws(11 + k).normal(count), rtol=1e-6, atol=1e-6), k


def test_a_row_s_own_step_and_the_end_of_the_steps() -> None:
    steps = torch.tensor([5, 0, 3, 2**32 - 1, 1, 2])
    noise = noise_batch(torch.zeros(6, 9), 1.0, FAR, steps, KEY, copies=2).view(6, 2, 9)
    for row, step in enumerate(steps.tolist()):
        for k in range(2):
            expected = draws((step + k) % 2**32).normal(9)[row]
            assert torch.allclose(noise[row, k], expected, rtol=1e-6, atol=1e-6), (row, k)


def test_noise_does_not_depend_on_the_batch_nor_on_the_pieces_it_is_made_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = torch.rand(6, 3, 5, 7)
    whole = noise_batch(x, 0.5, FAR, 0, KEY, 2)
    alone = noise_batch(x[3:4], 0.5, FAR[3:4], 0, KEY, 2)
    assert torch.allclose(whole[6:8], alone, atol=1e-6)
    for chunk in (1, 3, 40):
        monkeypatch.setattr(reference, "_CHUNK", chunk)
        assert torch.allclose(noise_batch(x, 0.5, FAR, 0, KEY, 2), whole, atol=1e-6), chunk


@pytest.mark.parametrize("scale", [1.0, 2 / 3, 3 / 2])
def test_the_noise_is_gaussian_with_this_sigma_and_no_other(scale: float) -> None:
    noise = noise_batch(torch.full((4, 5000), 2.0), 0.25, torch.arange(4), 0, KEY, copies=2)
    p = stats.kstest(noise.flatten().numpy(), "norm", args=(2.0, 0.25 * scale)).pvalue
    assert p > 1e-3 if scale == 1 else p < 1e-9


def test_neighbouring_numbers_copies_and_rows_are_uncorrelated() -> None:
    noise = noise_batch(torch.zeros(2, 20000), 1.0, torch.arange(2), 0, KEY, copies=2).view(2, 2, 20000)
    z = noise[0, 0]
    pairs = [(z, noise[0, 1]), (z, noise[1, 0]), (noise[0, 1], noise[1, 0])]
    pairs += [(z[:-lag], z[lag:]) for lag in (1, 2, 3, 4)]
    for first, second in pairs:
        assert abs(float((first * second).mean())) < 5 / 20000**0.5


def test_dtypes_are_kept_and_no_noise_is_a_repetition() -> None:
    x = torch.rand(6, 2, 3)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        noisy = noise_batch(x.to(dtype), 0.0, FAR, 0, KEY, 2)
        assert noisy.dtype == dtype
        assert torch.equal(noisy, x.to(dtype).repeat_interleave(2, 0))
    exact = noise_batch(x.double(), 1.0, FAR, 0, KEY)
    assert torch.allclose(noise_batch(x, 1.0, FAR, 0, KEY).double(), exact, rtol=0, atol=4e-6)


def test_empty_batches_and_rows_of_one_number() -> None:
    none = torch.empty(0, dtype=torch.int64)
    assert noise_batch(torch.zeros(0, 3, 4), 1.0, none, 0, KEY, 5).shape == (0, 3, 4)
    assert noise_batch(torch.zeros(6, 0), 1.0, FAR, 0, KEY, 5).shape == (30, 0)
    assert noise_batch(torch.zeros(6), 1.0, FAR, 0, KEY, 2).shape == (12,)


def test_the_gradient_is_the_sum_over_the_copies() -> None:
    x = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(18, 5, dtype=torch.float64)
    (noise_batch(x, 0.3, FAR, 0, KEY, 3) * weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.view(6, 3, 5).sum(1))


@pytest.mark.parametrize(
    "change",
    [
        {"sigma": -1.0},
        {"sigma": float("nan")},
        {"copies": 0},
        {"key": (2**32, 0)},
        {"key": (0, -1)},
        {"identity": FAR[:2]},
        {"identity": FAR.int()},
        {"step": FAR[:2]},
        {"x": torch.zeros(6, 2).long()},
    ],
)
def test_noise_refuses_what_it_cannot_mean(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"x": torch.zeros(6, 2), "sigma": 1.0, "identity": FAR, "step": 0, "key": KEY}
    noise_batch(**good)
    with pytest.raises(ValueError, match=r"."):
        noise_batch(**(good | change))


def test_votes_are_counted_as_numpy_counts_them() -> None:
    scores = torch.randn(3 * 50, 7, generator=torch.Generator().manual_seed(0))
    before = torch.arange(21).view(3, 7)
    counts = vote_counts(scores, before, 50)
    best = scores.numpy().argmax(1).reshape(3, 50)
    expected = np.stack([np.bincount(row, minlength=7) for row in best]) + before.numpy()
    assert torch.equal(counts, torch.from_numpy(expected))
    assert torch.equal(before, torch.arange(21).view(3, 7)), "the counts so far are not changed"
    assert torch.equal(vote_counts(scores.argmax(1), before, 50), counts)


def test_nan_rows_and_predictions_outside_vote_for_nobody_and_ties_for_the_first() -> None:
    nan, inf = torch.nan, torch.inf
    rows = [[0.0, nan, 9.0], [nan, nan, nan], [1, 5, 5], [-inf, -inf, -inf], [inf, 0, inf], [0, 0, inf]]
    counts = vote_counts(torch.tensor(rows), torch.zeros(2, 3).long(), 3)
    assert counts.tolist() == [[0, 1, 0], [2, 0, 1]]
    counts = vote_counts(torch.tensor([-1, 3, 2, 0, 0, 99]), torch.zeros(2, 3).long(), 3)
    assert counts.tolist() == [[0, 0, 1], [2, 0, 0]]


def test_votes_of_one_copy_of_one_class_and_of_nothing() -> None:
    assert vote_counts(torch.zeros(1, 1), torch.zeros(1, 1).long(), 1).tolist() == [[1]]
    assert vote_counts(torch.zeros(0, 4), torch.zeros(0, 4).long(), 3).shape == (0, 4)
    assert vote_counts(torch.zeros(2, 4).half(), torch.zeros(2, 4).long(), 1)[:, 0].tolist() == [1, 1]


@pytest.mark.parametrize(
    "scores", [torch.zeros(5, 3), torch.zeros(6, 2), torch.zeros(6), torch.zeros(6, 3).long()]
)
def test_votes_refuse_shapes_that_do_not_fit(scores: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits"):
        vote_counts(scores, torch.zeros(2, 3).long(), 3)


def test_votes_refuse_counts_that_could_overflow_and_no_copies() -> None:
    with pytest.raises(ValueError, match="int64"):
        vote_counts(torch.zeros(6, 3), torch.zeros(2, 3).int(), 3)
    with pytest.raises(ValueError, match="0 copies"):
        vote_counts(torch.zeros(0, 3), torch.zeros(2, 3).long(), 0)
