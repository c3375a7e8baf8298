"""What tests of inversions share: tiny networks for digits, and what an observer sees of a step on some."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from robust import Classifier, load_data
from robust.inversion import Protocol, Watched

SHAPE = (1, 8, 8)


@lru_cache
def digits(n: int = 260) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    return load_data("digits", n=n).tensors()


def make(build: Callable[[], nn.Module], seed: int = 0, **options: Any) -> Classifier:
    """A classifier with weights of this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Classifier(build().eval(), device="cpu", **options)


def linear() -> nn.Module:
    """One linear layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def perceptron() -> nn.Module:
    """A perceptron."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def sigmoid() -> nn.Module:
    """A tiny ConvNet with sigmoids, weights as DLG draws them."""
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, stride=2), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    for parameter in net.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return net


def relu() -> nn.Module:
    """A tiny ConvNet with ReLUs."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, stride=2), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(512, 10),
    )  # fmt: skip


def seen(
    clf: Classifier, rows: slice, protocol: Protocol | None = None, seed: int = 0
) -> tuple[Callable[[], list[Tensor]], Tensor, Tensor]:
    """What an observer sees of a step on these digits, and the digits."""
    protocol, watched = protocol or Protocol(), Watched(clf)
    x, y = (part[rows] for part in digits())
    low, high = clf.bounds
    x = x * (high - low) + low
    return lambda: protocol.observe(watched, x, y, seed=seed), x, y
