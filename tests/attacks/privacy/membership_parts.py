"""What tests of membership attacks share: small nets that have learnt random labels of digits by heart."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from robust import Classifier, load_data
from robust.membership import References, halves
from robust.stacked import Stacked, first_states, fit_stacked

N, MODELS = 240, 8


def net() -> nn.Module:
    """A perceptron for digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))


@lru_cache
def samples() -> tuple[Tensor, Tensor]:
    """Digits, half of them with labels drawn at random, which only a model that saw them knows."""
    data = load_data("digits", train=True, n=N + 120)
    x, y = data.tensors()
    generator = torch.Generator().manual_seed(4)
    noisy = torch.randint(0, 10, y.shape, generator=generator)
    return x, torch.where(torch.rand(len(y), generator=generator) < 0.5, noisy, y)


@lru_cache
def trained() -> tuple[Stacked, Tensor]:
    """A target on half of the samples in question, reference models on halves, and a model that saw none of them."""
    x, y = samples()
    target = halves(N, 1, seed=9)
    inside = torch.cat([target, halves(N, MODELS, seed=1)])
    rows = [part.nonzero()[:, 0] for part in inside] + [torch.arange(N, N + 120)]
    build = first_states(net, 0)
    models = fit_stacked(net(), (x, y), rows, first=build, epochs=60, batch_size=40, lr=1e-2, chunk=10)
    return models, inside


def subject(seen: bool = True) -> tuple[Classifier, Tensor, Tensor, Tensor, References]:
    """The target (or a model that saw no sample in question), samples, labels, members, and reference models."""
    models, inside = trained()
    x, y = samples()
    references = References([models.classifier(1 + k) for k in range(MODELS)], inside[1:])
    target = models.classifier(0 if seen else MODELS + 1)
    return target, x[:N], y[:N], inside[0], references
