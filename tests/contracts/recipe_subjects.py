"""Every registered recipe at a size that a test can afford, and a small task for them."""

from __future__ import annotations

import os
import signal
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust.data import load_data
from robust.defenses.training import get
from robust.fit import FitResult, fit
from robust.learner import Learner
from robust.recipe import Recipe
from robust.trainer import Progress

# What makes a recipe small, or is needed; only fields that it has are set.
SHORT: dict[str, Any] = {"eps": 0.1, "sigma": 0.2, "steps": 2, "replays": 3, "models": ("zoo:digits",)}


def fields(name: str) -> dict[str, Any]:
    """The fields of `SHORT` that a recipe has."""
    return {key: value for key, value in SHORT.items() if key in get(name).__dataclass_fields__}


def make(name: str, **changed: Any) -> Recipe:
    """A recipe by name at a test's size."""
    recipe: Recipe = get(name)(**fields(name) | changed)
    return recipe


@cache
def digits(n: int = 300) -> tuple[Tensor, Tensor]:
    """The first digits to train on."""
    return load_data("digits", train=True, n=n).tensors()


def network(norm: bool = True) -> nn.Sequential:
    """A small network for digits, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        layers = [nn.BatchNorm2d(8)] if norm else []
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, stride=2, padding=1), *layers, nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
        )


def learner(norm: bool = True) -> Learner:
    """It in training."""
    clf = Learner(network(norm).train())
    with clf.session():
        clf.check(digits()[0][:4])
    return clf


def train(name: str, out: Path | None = None, epochs: int = 2, **walk: Any) -> FitResult:
    """A short training by a recipe: three batches an epoch."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    walk = {"loss": make(name), "batch_size": 32, "lr": 1e-2, "checkpoint_seconds": 0, **walk}
    try:
        return fit(network(), digits(80), epochs=epochs, out=out, **walk)
    finally:
        torch.set_num_threads(count)


def die(event: Progress) -> None:
    """SIGKILL after the step that the command line names."""
    if event.step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # python -m tests.contracts.recipe_subjects NAME FOLDER STEP
    train(sys.argv[1], Path(sys.argv[2]), progress=die)
