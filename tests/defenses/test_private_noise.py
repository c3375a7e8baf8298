"""The noise of private steps: its distribution, its scale, its sources, and Poisson samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from robust.defenses.privacy import make_private
from robust.defenses.privacy.noise import KeyedNoise, Noise, SecureNoise
from robust.errors import ConfigError
from tests.defenses.privacy_parts import private

SOURCES: dict[str, Any] = {"keyed": lambda: KeyedNoise(7), "secure": SecureNoise}


def released(noise_multiplier: float, bound: float, batch: float, **options: Any) -> np.ndarray[Any, Any]:
    """What a step on no samples puts into the gradients of 20,000 weights in float64."""
    model = nn.Linear(100, 200, bias=False).double()
    optimizer = private(
        model, noise_multiplier=noise_multiplier, max_grad_norm=bound, expected_batch_size=batch, **options
    )
    model(torch.empty(0, 100, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert model.weight.grad is not None
    return model.weight.grad.flatten().numpy()


@pytest.mark.parametrize(
    "options", [{"seed": 3}, {"seed": None, "secure_mode": True}], ids=["keyed", "secure"]
)
@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic"])
def test_the_noise_has_the_right_scale_and_no_other(options: Any, clipping: str) -> None:
    noise = released(1.7, 0.6, 32.0, clipping=clipping, **options)
    std = 1.7 * 0.6 / 32
    assert stats.kstest(noise, stats.norm(scale=std).cdf).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(noise, stats.norm(scale=std * wrong).cdf).pvalue < 1e-12


@pytest.mark.parametrize("name", SOURCES)
def test_steps_and_numbers_are_independent(name: str) -> None:
    source: Noise = SOURCES[name]()
    one, two = (source.add(torch.zeros(10_001, dtype=torch.float64), 1.0, step) for step in (0, 1))
    for a, b in ((one, two), (one[1:], one[:-1]), (one[:5000].square(), one[5000:10_000].square())):
        assert abs(float(torch.corrcoef(torch.stack((a, b)))[0, 1])) < 5 / len(a) ** 0.5
    counts = [source.normal(step, 0.0) for step in range(2000)]
    assert stats.kstest(counts, stats.norm.cdf).pvalue > 1e-3


def test_keyed_noise_is_a_function_of_seed_and_step_and_secure_noise_is_not() -> None:
    zeros = torch.zeros(50)
    assert torch.equal(KeyedNoise(1).add(zeros, 1.0, 4), KeyedNoise(1).add(zeros, 1.0, 4))
    others = [KeyedNoise(2).add(zeros, 1.0, 4), KeyedNoise(1).add(zeros, 1.0, 5)]
    assert not any(torch.equal(KeyedNoise(1).add(zeros, 1.0, 4), other) for other in others)
    assert not torch.equal(SecureNoise().add(zeros, 1.0, 4), SecureNoise().add(zeros, 1.0, 4))
    seeds = {private(nn.Linear(1, 1), seed=None).seed for _ in range(4)}
    assert len(seeds) == 4


@pytest.mark.parametrize("name", SOURCES)
def test_poisson_samples_hold_each_sample_with_the_rate(name: str) -> None:
    source: Noise = SOURCES[name]()
    count, steps, rate = 300, 1000, 0.07
    hits, sizes = np.zeros(count), []
    for step in range(steps):
        rows = source.chosen(count, rate, step)
        assert rows.dtype == torch.int64
        assert bool((rows[1:] > rows[:-1]).all())
        hits[rows.numpy()] += 1
        sizes.append(len(rows))
    assert hits.sum() / (count * steps) == pytest.approx(rate, rel=0.03)
    error = (rate * (1 - rate) / steps) ** 0.5
    assert abs(hits / steps - rate).max() < 5 * error
    assert np.std(sizes) == pytest.approx((count * rate * (1 - rate)) ** 0.5, rel=0.15)  # no fixed size


def test_the_samples_of_a_step_do_not_depend_on_the_steps_before() -> None:
    assert torch.equal(KeyedNoise(3).chosen(100, 0.5, 9), KeyedNoise(3).chosen(100, 0.5, 9))
    assert len(KeyedNoise(3).chosen(100, 1.0, 0)) == 100
    samples = DataLoader(TensorDataset(torch.arange(30.0)[:, None]), 5)
    found = []
    for skipped in (0, 3):
        model = nn.Linear(1, 1)
        loader = make_private(
            model, torch.optim.SGD(model.parameters(), 0.1), samples, noise_multiplier=1, seed=2
        )[2]
        assert loader is not None
        loader.load_state_dict({"step": skipped})
        found.append([x.flatten().tolist() for (x,) in loader])
    assert found[0][3:] == found[1]


def test_data_that_cannot_be_sampled_is_refused() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            yield torch.zeros(1)

    model = nn.Linear(1, 1)
    with pytest.raises(ConfigError, match="iterable"):
        make_private(
            model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(Stream()), noise_multiplier=1
        )
    with pytest.raises(ConfigError, match="max_physical"):
        private_loader(0)


def private_loader(most: int) -> Any:
    """A loader with parts of at most `most` samples."""
    model, samples = nn.Linear(1, 1), TensorDataset(torch.zeros(4, 1))
    return make_private(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(samples, 2), noise_multiplier=1,
        max_physical_batch_size=most,
    )  # fmt: skip
