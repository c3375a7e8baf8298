"""Local intrinsic dimensionality."""

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
from robust.rng import derive

_ITSELF = 1e-6  # of the median distance: a reference so near is the point itself


@dataclass(frozen=True, kw_only=True)
class LID(Layered):
    """Local intrinsic dimensionality (Ma et al. 2018, arXiv:1801.02613): how distances to clean neighbours grow.

    Of every layer the maximum-likelihood estimate from a point's k nearest among clean references. The paper takes the
    rest of a point's own minibatch for references; here they are fixed, so that a score depends on its point only.

    Attributes:
        references: clean images that neighbours are sought among; the paper's minibatch has 100.
        neighbours: k; the paper has 20.
    """

    name: ClassVar[str] = "lid"
    references: int = 200
    neighbours: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = 2 <= self.neighbours <= self.references
        self.require(
            holds, f"neighbours={self.neighbours} of references={self.references}: at least 2, at most all"
        )

    def statistics(
        self, clf: Classifier, x: Tensor, y: Tensor, modules: list[nn.Module], seed: int
    ) -> Learnt:
        """See `Layered.statistics`: the references' features."""
        self.require(
            len(x) > self.neighbours,
            f"{len(x)} images hold no {self.neighbours} neighbours; give more, or choose fewer neighbours",
        )
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(derive(seed, "references")))
        chosen = x[order[: self.references].to(x.device)]
        return {f"{k}/references": v for k, v in enumerate(features_of_all(clf, chosen, modules))}

    def number(self, learnt: Mapping[str, Tensor], layer: int, values: Tensor) -> Tensor:
        """See `Layered.number`."""
        return dimensionality(values, learnt[f"{layer}/references"], self.neighbours)


def dimensionality(values: Tensor, references: Tensor, neighbours: int) -> Tensor:
    """(N,) −(mean of log(r_i / r_k) over the k nearest)⁻¹, of points (N, d) among references (M, d).

    A reference that is the point itself is passed over. Where all k are equally far the estimate is infinite in theory;
    it ends at 10⁴.
    """
    apart = (values[:, None] - references[None]).square().sum(2)
    itself = _ITSELF**2 * apart.detach().median(1, keepdim=True).values
    apart = torch.where(apart <= itself, torch.inf, apart)
    near = apart.topk(min(neighbours, references.shape[0] - 1), dim=1, largest=False).values
    logs = near.clamp(1e-20, 1e20).log() / 2
    return 1 / (logs[:, -1] - logs.mean(1)).clamp_min(1e-4)
