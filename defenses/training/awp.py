"""Adversarial weight perturbation (Wu et al. 2020, arXiv:2004.05884)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robust.attacks.base import Attack
from robust.classifier import Classifier
from robust.defenses.training.adversarial import IteratedRecipe
from robust.defenses.training.pgd_at import PGDAT
from robust.defenses.training.trades import TRADES
from robust.defenses.training.weights import attached, trainable, unlearned
from robust.recipe import require


def perturbation(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """gamma · ‖w‖ · g / ‖g‖, a layer's perturbation, relative to its own norm; zero where the gradient is."""
    length = gradient.norm()
    return gradient * torch.where(length > 0, gamma * weight.norm() / length, 0.0)


@contextmanager
def moved(parameters: Sequence[Tensor], by: Sequence[Tensor]) -> Iterator[None]:
    """The parameters are `by` further inside, and bit for bit as before afterwards."""
    before = [parameter.detach().clone() for parameter in parameters]
    with torch.no_grad():
        for parameter, change in zip(parameters, by, strict=True):
            parameter.add_(change)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)


@dataclass(frozen=True, kw_only=True)
class AWP(IteratedRecipe):
    """Adversarial weight perturbation: descent from the worst weights nearby (Wu et al. 2020, arXiv:2004.05884).

    At the adversarial points of its base method, every weight tensor l moves by γ ‖w_l‖ g_l / ‖g_l‖ up the base's
    loss; the gradient is taken there, on the same points, and descends from the weights themselves (the authors' code
    lets the optimizer step first and takes the move back then, which differs where weights decay). Vectors (biases,
    batch normalisation) do not move, and the forward that finds the direction teaches batch normalisation nothing, as
    in their code. The loss in the history is the one at the moved weights.

    Attributes:
        base: "pgd-at" or "trades".
        gamma: how far weights move, relative to their layer's norm: 0.005 in the paper.
        beta: TRADES' beta, where it is the base.
    """

    base: Literal["pgd-at", "trades"] = "pgd-at"
    gamma: float = 0.005
    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("base", self.base, self.base in ("pgd-at", "trades"), "pgd-at or trades")
        require("gamma", self.gamma, 0 < self.gamma < math.inf, "a positive number such as 0.005")
        require("beta", self.beta, 0 <= self.beta < math.inf, "0 or more")

    @property
    def method(self) -> IteratedRecipe:
        """The base recipe."""
        shared: dict[str, Any] = {
            "eps": self.eps, "norm": self.norm, "steps": self.steps, "step_size": self.step_size,
        }  # fmt: skip
        return TRADES(**shared, beta=self.beta) if self.base == "trades" else PGDAT(**shared)

    def attack(self) -> Attack:
        """The base's inner attack."""
        return self.method.attack()

    def outer(self, clf: Classifier, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The base's loss at the moved weights, whose gradient is the one there."""
        method, parameters = self.method, trainable(clf.module)
        layers = [parameter for parameter in parameters if parameter.dim() > 1]
        with unlearned(clf.module):
            uphill = torch.autograd.grad(method.outer(clf, x, x_adv, y), layers, allow_unused=True)
        by = [
            torch.zeros_like(w) if g is None else perturbation(w.detach(), g, self.gamma)
            for w, g in zip(layers, uphill, strict=True)
        ]
        with moved(layers, by):
            value = method.outer(clf, x, x_adv, y)
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return attached(value, parameters, gradients)

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """Twice the base's of the weights."""
        trades = chosen.get("base", cls.base) == "trades"
        return super().gradients(**chosen) + (3 if trades else 1)

    @classmethod
    def unprivate(cls, **chosen: Any) -> str:
        """The perturbation of the weights."""
        return "it moves the weights along the batch's own gradient, which no noise covers"
