"""Adversarial training with projected gradient descent (Madry et al. 2018, arXiv:1706.06083)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch.nn.functional as F
from torch import Tensor

from robust.attacks.whitebox.pgd import PGD
from robust.classifier import Classifier
from robust.errors import ConfigError
from robust.recipe import Recipe
from robust.threat import make_threat


@dataclass(frozen=True)
class PGDAT(Recipe):
    """PGD adversarial training: the loss of the strongest point PGD finds (Madry et al. 2018, arXiv:1706.06083).

    One step solves the inner maximum of ``min_w E max_{|d| <= eps} L(w, x + d, y)`` (their eq. 2.1) by PGD from a
    random start, and descends on its outer minimum (their Danskin argument, section 3). The inner attack sees the
    model in evaluation mode with frozen weights (batch normalisation uses its running statistics and does not learn
    from the iterates), the outer loss sees it in training mode. Random starts are keyed by the sample and by the
    epoch's seed, so they differ between epochs and do not depend on the batch. With `warmup`, eps and the step size
    rise linearly from near zero, without which training at a large eps (MNIST at 0.3) can stay at chance.

    It promises nothing by itself: robustness is what `robust eval` measures afterwards.

    Attributes:
        eps: radius in the unit of x.
        norm: "linf", "l2" or "l1".
        steps: gradient steps of the inner attack.
        step_size: length of one step; None takes PGD's own default.
        warmup: epochs over which eps rises.
    """

    eps: float
    norm: str = "linf"
    steps: int = 10
    step_size: float | None = None
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.eps < math.inf:
            raise ConfigError(
                f"eps={self.eps} is no radius to train at; it must be a positive number such as 8/255"
            )
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} leaves no inner attack; it must be 1 or more")
        if self.step_size is not None and not 0 < self.step_size < math.inf:
            raise ConfigError(f"step_size={self.step_size} does not move; it must be a positive number")
        if not 0 <= self.warmup < math.inf:
            raise ConfigError(f"warmup={self.warmup} is no number of epochs; it must be 0 or more")
        make_threat(self.norm, self.eps)

    def at(self, epoch: float) -> Self:
        """The recipe with the eps and step size of this moment of the warm-up."""
        if epoch >= self.warmup:
            return self
        risen = max(epoch / self.warmup, 1e-3)
        step_size = None if self.step_size is None else self.step_size * risen
        return replace(self, eps=self.eps * risen, step_size=step_size, warmup=0.0)

    def attack(self) -> PGD:
        """The inner attack."""
        return PGD(threat=make_threat(self.norm, self.eps), steps=self.steps, step_size=self.step_size)

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """Mean cross-entropy of the batch at its adversarial points."""
        with clf.session():
            x_adv = self.attack().points(clf, x, y, seed=epoch_seed, index=index)
        return F.cross_entropy(clf(x_adv), y)
