"""What the adversarial recipes share: a radius that may rise, an inner attack, and an outer loss at its points."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.whitebox.pgd import PGD
from robust.classifier import Classifier
from robust.recipe import Recipe, require
from robust.threat import Threat, make_threat

_RISING = ("eps", "step_size")


def inner_points(attack: Attack, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
    """Adversarial points to train on: the one place where recipes run their inner attacks.

    The attack sees the model in evaluation mode with frozen weights: batch normalisation uses its running statistics
    and does not learn from the iterates. The model answers itself (no twin), for its weights move with every step.

    Args:
        attack: keeps, as every attack here, a sample's strongest point, the clean one included.
        x: (B, C, H, W) in the box; y: (B,) labels; index: (B,) identities, which key the randomness with `seed`.
    """
    with clf.session():
        return attack(clf, x, y, seed=seed, index=index, precision="original")


@dataclass(frozen=True, kw_only=True)
class AdversarialRecipe(Recipe):
    """Training on adversarial points: `outer` is minimised where `attack` has maximised.

    Random starts are keyed by the sample and by the epoch's seed, so they differ between epochs and do not depend on
    the batch. With `warmup`, eps and the step size rise linearly from near zero, without which training at a large
    eps (MNIST at 0.3) can stay at chance.

    Attributes:
        eps: radius in the unit of x.
        norm: "linf", "l2" or "l1".
        warmup: epochs over which eps rises.
    """

    eps: float
    norm: str = "linf"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        require("eps", self.eps, 0 < self.eps < math.inf, "a positive number such as 8/255")
        require("norm", self.norm, self.norm in ("linf", "l2", "l1"), "linf, l2 or l1")
        require("warmup", self.warmup, 0 <= self.warmup < math.inf, "0 epochs or more")

    @property
    def threat(self) -> Threat:
        """The ball of the inner attack."""
        return make_threat(self.norm, self.eps)

    def at(self, epoch: float) -> Self:
        """The recipe with the eps and step size of this moment of the warm-up."""
        if epoch >= self.warmup:
            return self
        risen = max(epoch / self.warmup, 1e-3)
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in _RISING}
        changed = {name: value * risen for name, value in values.items() if value is not None}
        return replace(self, **changed, warmup=0.0)

    def check(self, clf: Classifier, x: Tensor) -> None:
        """Refuses a radius that cannot be meant for the model's box."""
        self.threat.check(clf.bounds)

    def attack(self) -> Attack:
        """The inner attack."""
        raise NotImplementedError(f"{type(self).__name__} has no inner attack")

    def adversarial(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
        """The points (B, C, H, W) of the inner attack; see `inner_points`."""
        return inner_points(self.attack(), clf, x, y, index, seed)

    def outer(self, clf: Classifier, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The scalar to minimise at the adversarial points `x_adv` of x: mean cross-entropy."""
        return F.cross_entropy(clf(x_adv), y)

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """`outer` at the points of the inner attack."""
        return self.outer(clf, x, self.adversarial(clf, x, y, index, epoch_seed), y)


@dataclass(frozen=True, kw_only=True)
class IteratedRecipe(AdversarialRecipe):
    """Adversarial training whose inner attack takes several gradient steps: PGD, unless a method says otherwise.

    Attributes:
        steps: gradient steps of the inner attack.
        step_size: length of one step in the unit of x; None takes the attack's own default, 2.5 · eps / steps.
    """

    steps: int = 10
    step_size: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require("steps", self.steps, self.steps >= 1, "1 or more: there is an inner attack")
        good = self.step_size is None or 0 < self.step_size < math.inf
        require("step_size", self.step_size, good, "a positive number, or none")

    def attack(self) -> Attack:
        """PGD from a keyed random start."""
        return PGD(threat=self.threat, steps=self.steps, step_size=self.step_size)

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """The inner steps, and the weights' gradient."""
        return float(chosen.get("steps", cls.steps)) + 1.0
