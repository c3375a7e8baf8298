"""Membership from labels alone: is the answer right, and how far does it stay right around the sample?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.blackbox.hopskipjump import HopSkipJump
from robust.attacks.privacy.base import MembershipAttack
from robust.classifier import Classifier
from robust.errors import RobustError
from robust.membership import VIEWS, Evidence, viewed
from robust.oracle import Oracle
from robust.rng import Draws, derive
from robust.threat import L2

_CHUNK = 100  # samples whose distances are kept in one part
_FAR = 2.0  # where no boundary was found: so many times the largest distance that was


@dataclass(frozen=True, kw_only=True)
class Gap(MembershipAttack):
    """Gap attack (Yeom et al. 2018, arXiv:1709.01604): what the model gets right was in its training data."""

    sees: ClassVar[Literal["scores", "labels"]] = "labels"

    def score(self, evidence: Evidence) -> Tensor:
        """1 for a right label, else 0."""
        return (evidence.labels() == evidence.y).double()


@dataclass(frozen=True, kw_only=True)
class Boundary(MembershipAttack):
    """Label-only attack (Choquette-Choo et al. 2021, arXiv:2007.14321): labels of members hold farther around them.

    Attributes:
        by: "hopskipjump": the l2 distance to the decision boundary; "noise": the part of copies under Gaussian noise
            that keep the right label; "augmentation": the part of 18 mirrored and shifted views that do.
        queries: for each sample, of "hopskipjump" and "noise".
        sigma: the noise's deviation, as a part of the box's width.
    """

    sees: ClassVar[Literal["scores", "labels"]] = "labels"
    by: Literal["hopskipjump", "noise", "augmentation"] = "hopskipjump"
    queries: int = 1000
    sigma: float = 0.1

    def __post_init__(self) -> None:
        if self.by not in ("hopskipjump", "noise", "augmentation"):
            raise RobustError(f"by={self.by!r} is unknown; use 'hopskipjump', 'noise' or 'augmentation'")
        if self.queries < 1 or not self.sigma > 0:
            raise RobustError(f"queries={self.queries}, sigma={self.sigma}: at least 1, and positive")

    def score(self, evidence: Evidence) -> Tensor:
        """A distance (0 for a wrong label), or the part of copies with the right label."""
        target = evidence.target
        oracle = Oracle(target, answers="labels") if isinstance(target, Classifier) else target
        if self.by == "augmentation":
            return self._kept(oracle, evidence, len(VIEWS))
        if self.by == "noise":
            return self._kept(oracle, evidence, self.queries)
        parts = [
            self._distances(oracle, evidence, slice(start, start + _CHUNK))
            for start in range(0, len(evidence), _CHUNK)
        ]
        distance = torch.cat(parts)
        found = distance.isfinite()
        if not bool(found.any()):
            return torch.ones(len(evidence))
        return torch.where(found, distance, _FAR * distance[found].max())

    def _distances(self, oracle: Oracle, evidence: Evidence, rows: slice) -> Tensor:
        """(n,) l2 distances to the boundary, infinite where the search found none."""

        def search() -> dict[str, Tensor]:
            attack = HopSkipJump(threat=L2(), until="smallest", queries=self.queries)
            result = attack.run(
                oracle, evidence.x[rows], evidence.y[rows].to(evidence.x.device), seed=evidence.seed,
                index=evidence.index[rows],
            )  # fmt: skip
            return {"distance": torch.where(result.success, result.distance, torch.inf)}

        own = derive(evidence.seed, "hopskipjump", self.queries)
        return evidence.keep(f"answers/boundary-{own:016x}-{rows.start:05d}", search)["distance"]

    def _kept(self, oracle: Oracle, evidence: Evidence, copies: int) -> Tensor:
        """(N,) the part of copies whose label is right."""
        right = torch.zeros(len(evidence), dtype=torch.float64)
        for k in range(copies):
            right += (oracle.labels(self._copy(evidence, oracle.bounds, k)).cpu() == evidence.y).double()
        return right / copies

    def _copy(self, evidence: Evidence, bounds: tuple[float, float], number: int) -> Tensor:
        if self.by == "augmentation":
            return viewed(evidence.x, number)
        low, high = bounds
        draws = Draws(evidence.seed, "membership/noise", evidence.index.to(evidence.x.device), number)
        noise = draws.normal(*evidence.x.shape[1:]).to(evidence.x)
        return (evidence.x + self.sigma * (high - low) * noise).clamp(low, high)
