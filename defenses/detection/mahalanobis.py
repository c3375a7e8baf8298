"""Mahalanobis distances to class-conditional Gaussians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.defenses.detection.combined import Layered
from robust.defenses.detection.features import features_of_all
from robust.detector import Learnt


@dataclass(frozen=True, kw_only=True)
class Mahalanobis(Layered):
    """Mahalanobis detector (Lee et al. 2018, arXiv:1807.03888): distance to the nearest class's Gaussian, over layers.

    Each layer's pooled features have one Gaussian a class, with a covariance that all classes share. With `magnitude`
    an input first takes a step towards its nearest class, as the paper does for its best numbers; gradients hold that
    step fixed.

    Attributes:
        ridge: added to the covariance's diagonal, as a part of its mean: features that never vary have an inverse too.
        magnitude: of the step, in the unit of x; 0 for none.
    """

    name: ClassVar[str] = "mahalanobis"
    ridge: float = 1e-3
    magnitude: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.ridge < float("inf"), f"ridge={self.ridge} must be positive")
        self.require(
            0 <= self.magnitude < float("inf"), f"magnitude={self.magnitude} is no step; give 0 or more"
        )

    def statistics(
        self, clf: Classifier, x: Tensor, y: Tensor, modules: list[nn.Module], seed: int
    ) -> Learnt:
        """See `Layered.statistics`: means (K, d) and a precision's factor (d, d) of every layer."""
        learnt: Learnt = {}
        for k, values in enumerate(features_of_all(clf, x, modules)):
            means, factor = gaussians(values, y, self.ridge)
            learnt |= {f"{k}/means": means, f"{k}/factor": factor}
        return learnt

    def number(self, learnt: Mapping[str, Tensor], layer: int, values: Tensor) -> Tensor:
        """See `Layered.number`: the squared distance to the nearest class."""
        white = values @ learnt[f"{layer}/factor"]
        centres = learnt[f"{layer}/means"] @ learnt[f"{layer}/factor"]
        return (white[:, None] - centres[None]).square().sum(2).amin(1)

    def numbers(
        self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, modules: list[nn.Module]
    ) -> Tensor:
        """See `Layered.numbers`, after the step towards the nearest class."""
        if self.magnitude:
            with torch.enable_grad():
                at = x.detach().requires_grad_(True)
                (slope,) = torch.autograd.grad(super().numbers(clf, learnt, at, modules)[:, -1].sum(), at)
            x = (x - self.magnitude * slope.sign()).clamp(*clf.bounds)
        return super().numbers(clf, learnt, x, modules)


def gaussians(values: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Class means (K, d), of the classes that occur, and L (d, d) with L Lᵀ the inverse of the shared covariance.

    Args:
        values: (N, d); y: (N,) classes. ridge: a part of the mean variance that is added to every variance.
    """
    wide = values.double()
    classes, place = y.unique(return_inverse=True)
    means = torch.stack([wide[place == k].mean(0) for k in range(len(classes))])
    centred = wide - means[place]
    covariance = centred.T @ centred / len(wide)
    lift = ridge * covariance.diagonal().mean().clamp_min(1e-12)
    covariance = covariance + lift * torch.eye(wide.shape[1], dtype=wide.dtype, device=wide.device)
    factor = torch.linalg.inv(torch.linalg.cholesky(covariance)).T
    return means.float(), factor.float().contiguous()
