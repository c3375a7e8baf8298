"""Training under Gaussian noise, for randomised smoothing (Cohen et al. 2019, arXiv:1902.02918)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from robust.classifier import Classifier
from robust.recipe import Recipe, require
from robust.rng import Draws


@dataclass(frozen=True, kw_only=True)
class Gaussian(Recipe):
    """Gaussian noise augmentation: cross-entropy at x + N(0, sigma² I) (Cohen et al. 2019, arXiv:1902.02918).

    The noise is not clipped to the box, because the smoothed classifier that votes later sees it unclipped. It is
    keyed by sample and epoch.

    Attributes:
        sigma: standard deviation in the unit of x; the one that will be certified with.
    """

    sigma: float

    def __post_init__(self) -> None:
        require("sigma", self.sigma, 0 < self.sigma < math.inf, "a positive number such as 0.25")

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """Mean cross-entropy of the noisy batch."""
        noise = Draws(epoch_seed, "gaussian", index).normal(*x.shape[1:]).to(x)
        return F.cross_entropy(clf(x + self.sigma * noise), y)
