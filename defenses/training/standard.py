"""Standard training: empirical risk minimisation on clean samples (Vapnik 1992)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from robust.classifier import Classifier
from robust.recipe import Recipe


@dataclass(frozen=True)
class Standard(Recipe):
    """Standard training: cross-entropy on the clean samples (Vapnik 1992). It promises no robustness."""

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """Mean cross-entropy of the batch; a standard step draws nothing, so identities and seed are not used."""
        return F.cross_entropy(clf(x), y)
