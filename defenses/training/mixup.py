"""Mixup (Zhang et al. 2018, arXiv:1710.09412)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.classifier import Classifier
from robust.recipe import Recipe, require
from robust.rng import Draws


@dataclass(frozen=True, kw_only=True)
class Mixup(Recipe):
    """Mixup: training on convex combinations of pairs and of their labels (Zhang et al. 2018, arXiv:1710.09412).

    A sample is mixed with a partner of its batch, ``λ x + (1 − λ) x'``, and its label likewise, λ ~ Beta(alpha, alpha)
    drawn for every sample (their released code draws one λ a batch, their equations any). λ and the circle in which
    each is its neighbour's partner are keyed by sample and epoch.

    Attributes:
        alpha: concentration: towards 0 nothing is mixed, 1 is uniform (their CIFAR-10), larger mixes by halves.
    """

    alpha: float = 1.0

    def __post_init__(self) -> None:
        require("alpha", self.alpha, 0 < self.alpha < math.inf, "a positive number")

    def pairs(self, index: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """The partners' rows (B,) of samples `index` (B,), in a keyed circle, and their λ (B,) in [0, 1]."""
        from scipy.special import betaincinv

        draws = Draws(seed, "mixup", index).uniform(2).cpu()
        order = draws[:, 0].argsort(stable=True)
        partner = torch.empty_like(order).scatter_(0, order, order.roll(-1))
        quantile = betaincinv(self.alpha, self.alpha, draws[:, 1].double().numpy())
        return partner.to(index.device), torch.from_numpy(quantile).float().to(index.device)

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """Mean over the batch of λ CE(f(x̃), y) + (1 − λ) CE(f(x̃), y')."""
        partner, share = self.pairs(index, epoch_seed)
        column = share.view(-1, *[1] * (x.dim() - 1)).to(x)
        logits = clf(column * x + (1 - column) * x[partner])
        own, other = (F.cross_entropy(logits, label, reduction="none") for label in (y, y[partner]))
        return (share * own + (1 - share) * other).mean()

    @classmethod
    def unprivate(cls, **chosen: Any) -> str:
        """Pairs."""
        return "it mixes each sample with another one, so that no gradient is one sample's alone"
