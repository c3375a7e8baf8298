"""TRADES: accuracy traded off against the stability of the prediction (Zhang et al. 2019, arXiv:1901.08573)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.whitebox.tpgd import TPGD
from robust.classifier import Classifier
from robust.defenses.training.adversarial import IteratedRecipe
from robust.recipe import require


def divergence(clean: Tensor, attacked: Tensor) -> Tensor:
    """KL(p(x) ‖ p(x')) per row, in nats: (B,) from the logits (B, K) of x and x'; gradients flow to both."""
    reference = clean.log_softmax(1)
    return (reference.exp() * (reference - attacked.log_softmax(1))).sum(1)


def trades_loss(clean: Tensor, attacked: Tensor, y: Tensor, beta: float) -> Tensor:
    """Mean of CE(f(x), y) + beta · KL(p(x) ‖ p(x')), from the logits (B, K) of x and x', beta being 1/λ."""
    return F.cross_entropy(clean, y) + beta * divergence(clean, attacked).mean()


@dataclass(frozen=True, kw_only=True)
class TRADES(IteratedRecipe):
    """TRADES: cross-entropy on clean points, divergence on attacked ones (Zhang et al. 2019, arXiv:1901.08573).

    The inner attack (`robust.attacks` knows it as `tpgd`) starts at x + 0.001 · N(0, I) and raises KL(p(x) ‖ p(x')),
    not the label's loss. Both forwards of the outer loss run in training mode, the clean one first.

    Attributes:
        beta: weight of the divergence, the paper's 1/λ: larger is more robust and less accurate; 6 in the paper.
    """

    beta: float = 6.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("beta", self.beta, 0 <= self.beta < math.inf, "0 or more")

    def attack(self) -> Attack:
        """The paper's inner maximiser."""
        return TPGD(threat=self.threat, steps=self.steps, step_size=self.step_size)

    def outer(self, clf: Classifier, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """`trades_loss` of the batch."""
        return trades_loss(clf(x), clf(x_adv), y, self.beta)

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """Two of the weights: at the clean and at the attacked points."""
        return super().gradients(**chosen) + 1
