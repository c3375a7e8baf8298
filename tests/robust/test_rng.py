"""Keyed randomness: the published generator's numbers, independence of the batch, and the right distributions."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from scipy.stats import kstest
from torch import Tensor

from robust.cuda_ops import philox
from robust.rng import JOB_BITS, Draws, derive, identities

# Philox4x32-10 in Random123's kat_vectors: counter, key, result.
KNOWN = {
    "zeros": ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
SIZE = 20_000  # enough for a Kolmogorov-Smirnov test to tell 2/3 and 3/2 of a scale


def source(n: int = 4, seed: int = 0, stream: str = "test", step: Tensor | int = 0, first: int = 0) -> Draws:
    """A source for n rows."""
    return Draws(seed, stream, torch.arange(first, first + n), step)


@pytest.mark.parametrize("case", KNOWN)
def test_philox_gives_the_published_numbers(case: str) -> None:
    counter, key, expected = KNOWN[case]
    a, b, c, d = (torch.tensor([word]) for word in counter)
    words = philox((a, b, c, d), key)
    assert tuple(int(word) for word in words) == expected


def test_philox_equals_its_definition_in_python_s_integers() -> None:
    def defined(counter: list[int], key: list[int]) -> list[int]:
        for _ in range(10):
            first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
            counter = [
                (second >> 32) ^ counter[1] ^ key[0],
                second & 0xFFFFFFFF,
                (first >> 32) ^ counter[3] ^ key[1],
                first & 0xFFFFFFFF,
            ]
            key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return counter

    counters = torch.randint(0, 2**32, (4, 50), generator=torch.Generator().manual_seed(0))
    a, b, c, d = counters
    words = torch.stack(philox((a, b, c, d), (123, 0xFEDCBA98)), dim=1)
    assert words.tolist() == [defined(counter, [123, 0xFEDCBA98]) for counter in counters.T.tolist()]


def test_draws_do_not_depend_on_the_batch_nor_on_how_many_are_taken() -> None:
    whole = source(7)
    for row, alone in enumerate(source(1, first=row) for row in range(7)):
        assert torch.equal(alone.bits(13)[0], whole.bits(13)[row])
        assert torch.equal(alone.uniform(3, 5)[0], whole.uniform(3, 5)[row])
        assert torch.equal(alone.signs(9)[0], whole.signs(9)[row])
        torch.testing.assert_close(alone.normal(3, 5)[0], whole.normal(3, 5)[row], rtol=1e-6, atol=1e-7)
    assert torch.equal(whole.bits(5), whole.bits(64)[:, :5])
    assert torch.equal(whole.bits(5), whole.bits(5))


def test_one_step_per_row_is_each_row_s_own() -> None:
    steps = torch.tensor([0, 3, 3, 9])
    mixed = source(4, step=steps).bits(6)
    for row, step in enumerate(steps.tolist()):
        assert torch.equal(mixed[row], source(4, step=step).bits(6)[row])
    assert torch.equal(source(4).at(steps).bits(6), mixed)


def test_every_part_of_the_key_gives_other_numbers() -> None:
    places = product((0, 1, 2**40), ("a", "b"), (0, 1, 2**31), (0, 1, 2**21, 2**42))
    seen = {
        tuple(Draws(seed, stream, torch.tensor([identity]), step).bits(4)[0].tolist())
        for seed, stream, step, identity in places
    }
    assert len(seen) == 3 * 2 * 3 * 4
    branch = source().branch("other")
    assert not torch.equal(branch.bits(4), source().bits(4))
    assert not torch.equal(branch.bits(4), branch.at(1).bits(4)), "a branch keeps the step"


def test_identities_of_jobs_do_not_collide() -> None:
    index = torch.tensor([0, 1, 2, 10**9])
    found = torch.cat([identities(index, job) for job in (0, 1, 2**JOB_BITS - 1)])
    assert len(set(found.tolist())) == 12
    assert torch.equal(identities(index), identities(index, torch.zeros(4, dtype=torch.long)))


def test_derived_seeds_differ_and_fit_a_generator() -> None:
    seeds = {derive(seed, name, number) for seed in range(3) for name in ("a", "b") for number in range(3)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, "a", 1) == derive(0, "a", 1)
    torch.Generator().manual_seed(derive(0, "a"))


def test_uniforms_are_uniform_and_no_other_scale_is() -> None:
    values = source(SIZE // 8).uniform(8)
    assert values.dtype == torch.float32
    assert float(values.min()) >= 0
    assert float(values.max()) < 1
    flat = values.flatten().numpy()
    assert kstest(flat, "uniform").pvalue > 0.01
    for scale in (2 / 3, 3 / 2):
        assert kstest(flat * scale, "uniform").pvalue < 1e-6
    assert torch.equal(source().uniform(), source().uniform(1)[:, 0]), "no shape is one number per row"


def test_uniforms_of_neighbouring_rows_and_steps_are_not_correlated() -> None:
    rows = source(SIZE // 4).uniform(4)
    later = source(SIZE // 4, step=1).uniform(4)
    for a, b in ((rows[:-1], rows[1:]), (rows, later), (rows[:, :-1], rows[:, 1:])):
        correlation = float(torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1])
        assert abs(correlation) < 4 / math.sqrt(a.numel())


def test_normals_are_standard_normal_and_no_other_scale_is() -> None:
    values = source(SIZE // 5).normal(5)
    assert bool(values.isfinite().all())
    flat = values.flatten().numpy()
    assert kstest(flat, "norm").pvalue > 0.01
    for scale in (2 / 3, 3 / 2):
        assert kstest(flat * scale, "norm").pvalue < 1e-6
    pairs = source(SIZE // 2).normal(2)
    correlation = float(torch.corrcoef(pairs.square().T)[0, 1])
    assert abs(correlation) < 4 / math.sqrt(len(pairs)), "the two of a pair share a radius"


def test_signs_and_integers_are_even() -> None:
    signs = source(SIZE).signs(1)
    assert set(signs.flatten().tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / math.sqrt(SIZE)
    counts = source(SIZE).below(7, 1).flatten().bincount(minlength=7)
    assert len(counts) == 7
    assert float(((counts - SIZE / 7) ** 2).sum() / (SIZE / 7)) < 22.5, "chi square with 6 degrees, p = 0.001"
    high = torch.tensor([[1], [2], [5], [2**31]])
    below = source(4).below(high, 1000)
    assert bool(((below >= 0) & (below < high)).all())
    assert below.amax(1)[:3].tolist() == [0, 1, 4]
    assert int(below[3].max()) > 2**30
