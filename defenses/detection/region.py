"""Region-based classification as a detector: do the points around an input agree with it?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.defense import substituted
from robust.detector import Detector
from robust.losses import best_other
from robust.rng import Draws, derive

_TOGETHER = 512  # points of a forward


@dataclass(frozen=True, kw_only=True)
class Region(Detector):
    """Region-based classification (Cao & Gong 2017, arXiv:1709.05583): votes in a hypercube that are not the input's.

    The score is the part of random points around x whose class is not x's own. A count of votes has no gradient;
    attacks raise the mean margin of x's class over fewer points (BPDA), drawn anew at every step (EOT).

    Attributes:
        radius: half a side of the hypercube, in the unit of x; the paper has 0.3 for MNIST and 0.02 for CIFAR-10.
        votes: points; the paper has 10,000 and 1,000.
        gradient_votes: points that a gradient is averaged over.
    """

    name: ClassVar[str] = "region"
    differentiable: ClassVar[bool] = False
    bpda: ClassVar[bool] = True
    randomised: ClassVar[bool] = True
    radius: float = 0.02
    votes: int = 100
    gradient_votes: int = 10

    def __post_init__(self) -> None:
        self.require(0 < self.radius < float("inf"), f"radius={self.radius} is no region; give one above 0")
        for key in ("votes", "gradient_votes"):
            self.require(
                getattr(self, key) >= 1, f"{key}={getattr(self, key)} decides nothing; give 1 or more"
            )

    def measure(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, draws: Draws) -> Tensor:
        """See `Detector.measure`: from 0 to 1."""
        own = clf(x).argmax(1)
        steep = torch.is_grad_enabled() and x.requires_grad
        count = self.gradient_votes if steep else self.votes
        each = max(_TOGETHER // len(x), 1)
        noise = self._noise(x, draws, count)
        against, margins = torch.zeros_like(x[:, 0, 0, 0]), torch.zeros_like(x[:, 0, 0, 0])
        for part in noise.split(each, dim=1):
            points = (x[:, None] + part.to(x)).clamp(*clf.bounds)
            logits, owner = clf(points.flatten(0, 1)), own.repeat_interleave(part.shape[1])
            against = against + (logits.detach().argmax(1) != owner).float().view(len(x), -1).sum(1)
            gap = best_other(logits, owner) - logits.gather(1, owner[:, None])[:, 0]
            margins = margins + gap.view(len(x), -1).sum(1)
        if not steep:
            return against / count
        return substituted(against.detach() / count, margins / count)

    def _noise(self, x: Tensor, draws: Draws, count: int) -> Tensor:
        """(N, count, C, H, W) uniform on the hypercube: a function of seed, identity and step."""
        steps = draws.step if isinstance(draws.step, Tensor) else torch.tensor(draws.step)
        rows = []
        for who, step in zip(draws.identity.tolist(), steps.expand(len(x)).tolist(), strict=True):
            key = derive(draws.seed, draws.stream, who, step)
            rows.append(torch.rand(count, *x.shape[1:], generator=torch.Generator().manual_seed(key)))
        return (torch.stack(rows) * 2 - 1) * self.radius
