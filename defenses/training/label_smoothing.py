"""Label smoothing (Szegedy et al. 2016, arXiv:1512.00567)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from robust.classifier import Classifier
from robust.recipe import Recipe, require


@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Recipe):
    """Label smoothing: cross-entropy against softened labels (Szegedy et al. 2016, arXiv:1512.00567, section 7).

    The label's distribution is ``(1 − smoothing) · onehot(y) + smoothing / K`` over K classes. It flattens logits,
    which weakens attacks that need their gradient more than it makes a model robust: `robust eval` tells.

    Attributes:
        smoothing: mass spread evenly over all classes, the paper's ε: 0.1 there.
    """

    smoothing: float = 0.1

    def __post_init__(self) -> None:
        require("smoothing", self.smoothing, 0 <= self.smoothing < 1, "in [0, 1)")

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """Mean cross-entropy against the softened labels; nothing is drawn."""
        return F.cross_entropy(clf(x), y, label_smoothing=self.smoothing)
