"""MagNet's detectors: an autoencoder of clean images does not know adversarial ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import functional_call

from robust.classifier import Classifier
from robust.defenses.detection.encoders import AutoEncoder, below, named, trained, unit
from robust.detector import Detector, Learnt
from robust.recipe import Loss
from robust.rng import Draws


@dataclass(frozen=True, kw_only=True)
class _MagNet(Detector):
    """An autoencoder trained on clean images with a little noise to take out.

    It has ReLUs, twice the hidden layers' width outside the bottleneck and Adam, where the paper has sigmoids and three
    channels throughout: that one needs hundreds of epochs.

    Attributes:
        width: of its middle layer. epochs: over the images. noise: standard deviation, as a part of the box's width.
    """

    width: int = 8
    epochs: int = 20
    noise: float = 0.05

    def __post_init__(self) -> None:
        for key in ("width", "epochs"):
            self.require(
                getattr(self, key) >= 1, f"{key}={getattr(self, key)} learns nothing; give 1 or more"
            )
        self.require(0 <= self.noise < 1, f"noise={self.noise} leaves no image; give less than 1")

    def learn(self, clf: Classifier, x: Tensor, y: Tensor, seed: int) -> Learnt:
        """See `Detector.learn`."""
        self.require(len(x) >= 4, f"{len(x)} images are too few to train on; give at least 4")
        module = AutoEncoder(x.shape[1], self.width)
        weights = trained(
            module, unit(x, clf.bounds), _rebuilding(self.noise), epochs=self.epochs, lr=3e-3, seed=seed
        )
        return named("autoencoder", weights)

    def rebuilt(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What the autoencoder makes of x (N, C, H, W), in the box."""
        weights = below("autoencoder", learnt)
        module = AutoEncoder(x.shape[1], self.width)
        flat: Tensor = functional_call(module, weights, (unit(x, clf.bounds),))
        return flat.view_as(x) * (clf.bounds[1] - clf.bounds[0]) + clf.bounds[0]


def _rebuilding(noise: float) -> Loss:
    """The mean squared error of images rebuilt from noisy ones."""

    def loss(net: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        drawn = Draws(epoch_seed, "noise", index).normal(*x.shape[1:]).to(x)
        noisy = (x + noise * drawn).clamp(0, 1)
        return (net.training_logits(noisy) - x.flatten(1)).square().mean()

    return loss


@dataclass(frozen=True, kw_only=True)
class MagNetError(_MagNet):
    """MagNet's reconstruction error (Meng & Chen 2017, arXiv:1705.09064): how far an autoencoder moves the input.

    Attributes:
        p: the error is the mean of |x − rebuilt x|ᵖ to the 1/p; the paper has 1 and 2.
    """

    name: ClassVar[str] = "magnet-error"
    p: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(1 <= self.p < float("inf"), f"p={self.p} is no norm; give 1 or more")

    def measure(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, draws: Draws) -> Tensor:
        """See `Detector.measure`: in the unit of x."""
        apart = (x - self.rebuilt(clf, learnt, x)).flatten(1).abs()
        return apart.pow(self.p).mean(1).clamp_min(1e-30).pow(1 / self.p)


@dataclass(frozen=True, kw_only=True)
class MagNetDivergence(_MagNet):
    """MagNet's divergence (Meng & Chen 2017, arXiv:1705.09064): Jensen-Shannon, of the answers to x and rebuilt x.

    Attributes:
        temperature: T that logits are divided by before the softmax; the paper has 10 and 40.
    """

    name: ClassVar[str] = "magnet-divergence"
    temperature: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = 0 < self.temperature < float("inf")
        self.require(holds, f"temperature={self.temperature} must be positive")

    def measure(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, draws: Draws) -> Tensor:
        """See `Detector.measure`: in nats, from 0 to log 2."""
        return jensen_shannon(clf(x) / self.temperature, clf(self.rebuilt(clf, learnt, x)) / self.temperature)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """(N,) the Jensen-Shannon divergence, in nats, of the distributions that logits (N, K) stand for."""
    p, q = first.log_softmax(1), second.log_softmax(1)
    middle = torch.logaddexp(p, q) - math.log(2)
    halves = (p.exp() * (p - middle)).sum(1) + (q.exp() * (q - middle)).sum(1)
    return halves / 2
