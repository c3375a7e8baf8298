"""MART: adversarial training that minds misclassified samples (Wang et al. 2020, ICLR, openreview rklOg6EFwS)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.classifier import Classifier
from robust.defenses.training.adversarial import IteratedRecipe
from robust.defenses.training.trades import divergence
from robust.recipe import require


def boosted_cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """−log p_y − log(1 − max_{k≠y} p_k), their BCE, per row: (B,) from logits (B, K).

    The second term is logsumexp over all classes minus logsumexp over all but the best wrong one, which stays finite
    where that class has probability 1 in floating point.
    """
    others = logits.scatter(1, y[:, None], -torch.inf)
    best = others.detach().argmax(1, keepdim=True)
    rest = logits.scatter(1, best, -torch.inf).logsumexp(1)
    return F.cross_entropy(logits, y, reduction="none") + logits.logsumexp(1) - rest


def mart_loss(clean: Tensor, attacked: Tensor, y: Tensor, lam: float) -> Tensor:
    """Mean of BCE(p(x'), y) + lam · KL(p(x) ‖ p(x')) · (1 − p_y(x)), from the logits (B, K) of x and x'."""
    doubtful = 1 - clean.softmax(1).gather(1, y[:, None])[:, 0]
    return (boosted_cross_entropy(attacked, y) + lam * divergence(clean, attacked) * doubtful).mean()


@dataclass(frozen=True, kw_only=True)
class MART(IteratedRecipe):
    """MART: boosted cross-entropy, and divergence weighted by doubt (Wang et al. 2020, openreview:rklOg6EFwS).

    The inner attack is PGD on the label's cross-entropy. The weight 1 − p_y(x) turns the divergence to the samples
    that the model gets wrong without an attack; gradients flow through it too, as in the paper.

    Attributes:
        lam: weight of the divergence, the paper's λ: 5 there.
    """

    lam: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require("lam", self.lam, 0 <= self.lam < math.inf, "0 or more")

    def outer(self, clf: Classifier, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """`mart_loss` of the batch."""
        return mart_loss(clf(x), clf(x_adv), y, self.lam)

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """Two of the weights: at the clean and at the attacked points."""
        return super().gradients(**chosen) + 1
