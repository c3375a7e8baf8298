"""Adversarial training with the fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.whitebox.fgsm import FGM
from robust.classifier import Classifier
from robust.defenses.training.single_step import SingleStepRecipe
from robust.recipe import require


@dataclass(frozen=True, kw_only=True)
class FGSMAT(SingleStepRecipe):
    """FGSM adversarial training: clean loss and loss after one step of eps (Goodfellow et al. 2015, arXiv:1412.6572).

    ``α J(x) + (1 − α) J(x + eps · sign ∇J)`` (their section 6); in l2 and l1 the step is the norm's own steepest one.
    The clean forward runs first; both run in training mode. At large eps it collapses easily (see
    `SingleStepRecipe`): the step starts at the clean point, where a model can learn to bend its gradient.

    Attributes:
        ratio: weight of the clean loss, the paper's α: 0.5 there; 0 for adversarial points only.
    """

    ratio: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require("ratio", self.ratio, 0 <= self.ratio < 1, "in [0, 1)")

    def attack(self) -> Attack:
        """One step of eps from the clean point."""
        return FGM(threat=self.threat)

    def outer(self, clf: Classifier, x: Tensor, x_adv: Tensor, y: Tensor) -> Tensor:
        """The two losses, weighted."""
        if self.ratio == 0:
            return F.cross_entropy(clf(x_adv), y)
        clean = F.cross_entropy(clf(x), y)
        return self.ratio * clean + (1 - self.ratio) * F.cross_entropy(clf(x_adv), y)

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """The step, and the weights' gradient of each loss."""
        return 2.0 if chosen.get("ratio", cls.ratio) == 0 else 3.0
