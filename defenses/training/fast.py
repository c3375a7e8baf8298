"""Fast adversarial training (Wong et al. 2020, arXiv:2001.03994), with gradient alignment (arXiv:2007.02617)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.whitebox.ffgsm import FFGSM
from robust.classifier import Classifier
from robust.defenses.training.single_step import SingleStepRecipe
from robust.defenses.training.weights import unlearned
from robust.recipe import require
from robust.rng import Draws


def misalignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean of 1 − cos between rows of two gradients (B, …); rows where either is zero do not count."""
    first, second = first.flatten(1), second.flatten(1)
    live = ((first != 0).any(1) & (second != 0).any(1)).nonzero()[:, 0]
    if not len(live):
        return (first.sum() + second.sum()) * 0.0
    # Gradients of confident samples are tiny: scaled to a largest entry of one before their norms are taken.
    first, second = (part[live] / part[live].detach().abs().amax(1, keepdim=True) for part in (first, second))
    return 1 - F.cosine_similarity(first, second, dim=1).mean()


@dataclass(frozen=True, kw_only=True)
class Fast(SingleStepRecipe):
    """Fast adversarial training: one step of 1.25 eps from a random start (Wong et al. 2020, arXiv:2001.03994).

    With `alignment` the loss has GradAlign's regulariser (Andriushchenko & Flammarion 2020, arXiv:2007.02617):
    ``alignment · (1 − cos(∇ₓ L(x), ∇ₓ L(x + η)))``, η uniform in the ball and keyed by sample and epoch, which keeps
    the loss linear enough there for the one step to be worth following, and so prevents the collapse. It
    differentiates twice (about six gradients more); its forwards run in training mode, as theirs do, but teach
    batch normalisation nothing. Their λ for CIFAR-10 at 8/255 is 0.2.

    Attributes:
        step_size: in the unit of x; None for 1.25 · eps.
        alignment: weight of the regulariser; 0 for none.
    """

    step_size: float | None = None
    alignment: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        good = self.step_size is None or 0 < self.step_size < math.inf
        require("step_size", self.step_size, good, "a positive number, or none")
        require("alignment", self.alignment, 0 <= self.alignment < math.inf, "0 or more")

    @property
    def second_order(self) -> bool:
        """See `Recipe.second_order`."""
        return self.alignment > 0

    def attack(self) -> Attack:
        """The step from a keyed random start."""
        return FFGSM(threat=self.threat, step_size=self.step_size)

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """Mean cross-entropy at the adversarial points, and the regulariser."""
        value = super().loss(clf, x, y, index, epoch_seed)
        if self.alignment == 0:
            return value
        nearby = self.threat.random(x, clf.bounds, Draws(epoch_seed, "alignment", index))
        with unlearned(clf.module):
            clean, moved = (_input_gradient(clf, points, y) for points in (x, nearby))
        return value + self.alignment * misalignment(clean, moved)

    @classmethod
    def unprivate(cls, **chosen: Any) -> str:
        """With the regulariser, a mean over those samples that have a gradient, differentiated twice."""
        if chosen.get("alignment", cls.alignment) == 0:
            return ""
        return "alignment differentiates a gradient, which cannot be told apart by samples; leave it at 0"

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """The step and the weights' gradient; the regulariser's two, and twice as many through them."""
        return 8.0 if chosen.get("alignment", cls.alignment) > 0 else 2.0


def _input_gradient(clf: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """The gradient (B, C, H, W) of the summed cross-entropy, itself with a graph to the weights."""
    x = x.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(F.cross_entropy(clf(x), y, reduction="sum"), x, create_graph=True)
    return gradient
