"""Feature squeezing: does the answer change when the input is made simpler?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.classifier import Classifier
from robust.defense import Defense
from robust.defenses.transforms.depth import BitDepth
from robust.defenses.transforms.median import MedianSmooth
from robust.detector import Detector, Learnt
from robust.rng import Draws


@dataclass(frozen=True, kw_only=True)
class NonLocalMeans(Defense):
    """Non-local means (Buades et al. 2005; as a squeezer Xu et al. 2018, arXiv:1704.01155).

    Each pixel is the mean of those around it, weighted by exp(−d² / h²), d² being the mean squared difference of the
    patches around the two. Edges are reflected. Attacks take the identity's gradient: so weak a smoothing changes
    little.

    Attributes:
        search: side of the square that pixels come from; patch: side of the patches that are compared; both odd.
        strength: h, in 1/255 of the box's width.
    """

    name: ClassVar[str] = "non-local-means"
    differentiable: ClassVar[bool] = False
    bpda: ClassVar[bool] = True
    search: int = 13
    patch: int = 3
    strength: float = 2.0

    def __post_init__(self) -> None:
        for key in ("search", "patch"):
            value = getattr(self, key)
            self.require(value >= 1 and value % 2 == 1, f"{key}={value} has no middle; give an odd number")
        self.require(0 < self.strength < 1e6, f"strength={self.strength} must be positive")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        reach, edge = self.search // 2, self.patch // 2
        height, width = x.shape[2:]
        self.require(
            reach + edge < min(height, width),
            f"search={self.search} reaches beyond images of {height}×{width}; choose less",
        )
        wide = F.pad(x, (reach + edge,) * 4, mode="reflect")
        inner = wide[:, :, reach : reach + height + 2 * edge, reach : reach + width + 2 * edge]
        scale = (self.strength / 255 * (bounds[1] - bounds[0])) ** 2
        total, weights = torch.zeros_like(x), torch.zeros_like(x[:, :1])
        for dy in range(self.search):
            for dx in range(self.search):
                other = wide[:, :, dy : dy + height + 2 * edge, dx : dx + width + 2 * edge]
                apart = (other - inner).square().mean(1, keepdim=True)
                weight = F.avg_pool2d(apart, self.patch, 1).div_(-scale).exp_()
                total += weight * other[:, :, edge : edge + height, edge : edge + width]
                weights += weight
        return total / weights


@dataclass(frozen=True, kw_only=True)
class FeatureSqueezing(Detector):
    """Feature squeezing (Xu et al. 2018, arXiv:1704.01155): the largest l1 distance of softmax to squeezed versions.

    The squeezers are bit-depth reduction, a local median and non-local means; a 0 leaves one out. The paper's best
    joint ones are bits=1 median=2 search=0 for MNIST and bits=5 median=2 search=13 for CIFAR-10, the defaults. Rounding
    and non-local means have no useful gradient; attacks take the identity's (BPDA).

    Attributes:
        bits: levels 2^bits of each value. median: side of the square. search, patch, strength: of non-local means.
    """

    name: ClassVar[str] = "feature-squeezing"
    differentiable: ClassVar[bool] = False
    bpda: ClassVar[bool] = True
    bits: int = 5
    median: int = 2
    search: int = 13
    patch: int = 3
    strength: float = 2.0

    def __post_init__(self) -> None:
        for key in ("bits", "median", "search", "patch", "strength"):
            self.require(getattr(self, key) >= 0, f"{key}={getattr(self, key)} must be 0 or more")
        self.require(bool(self.squeezers()), "bits=0, median=0 and search=0 leave no squeezer; choose one")

    def squeezers(self) -> list[Defense]:
        """The transforms, in the order of the fields."""
        chosen: list[Defense] = []
        if self.bits:
            chosen.append(BitDepth(bits=self.bits))
        if self.median:
            chosen.append(MedianSmooth(size=self.median))
        if self.search:
            chosen.append(NonLocalMeans(search=self.search, patch=self.patch, strength=self.strength))
        return chosen

    def learn(self, clf: Classifier, x: Tensor, y: Tensor, seed: int) -> Learnt:
        """See `Detector.learn`: nothing, but squeezers that such images are too small for are refused."""
        for squeezer in self.squeezers():
            squeezer.transform(x[:1], clf.bounds, 0)
        return {}

    def measure(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, draws: Draws) -> Tensor:
        """See `Detector.measure`: from 0 to 2."""
        plain = clf(x).softmax(1)
        distances = [
            (clf(squeezer.apply(x, clf.bounds, 0)).softmax(1) - plain).abs().sum(1)
            for squeezer in self.squeezers()
        ]
        return torch.stack(distances).amax(0)
