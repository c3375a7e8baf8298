"""LiRA: is the target's answer on a sample likelier from models trained with the sample, or without it?

Carlini et al. 2022 (arXiv:2112.03570). Per sample and query the scaled logit φ of reference models with the sample (in)
and without it (out) is taken as Gaussian.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.privacy.base import ReferenceAttack, require_queries
from robust.attacks.privacy.signals import scaled
from robust.errors import RobustError
from robust.membership import Evidence

ENOUGH = 64  # reference models, from which the paper found a variance for every sample the better
_LEAST = 1e-6  # the smallest deviation: models that agree to rounding tell no finite likelihood

Variance = Literal["auto", "fixed", "per-example"]


def moments(values: Tensor, chosen: Tensor, per_example: bool) -> tuple[Tensor, Tensor]:
    """(N,) means and standard deviations over the chosen models.

    Args:
        values: (K, N) φ by model. chosen: (K, N) bool, which models count for each sample; one at least.
        per_example: a deviation for every sample (two chosen models at least, and the unbiased estimate); else one that
            is pooled over all samples, around each sample's own mean. With one model a sample there is nothing to
            pool, and the deviation is that of all values.
    """
    weight = chosen.double()
    count = weight.sum(0)
    mean = (values * weight).sum(0) / count
    squares = ((values - mean) ** 2 * weight).sum(0)
    if per_example:
        deviation = (squares / (count - 1)).sqrt()
    else:
        free = float((count - 1).sum())
        pooled = float(squares.sum()) / free if free > 0 else float(values[chosen].var(correction=0))
        deviation = torch.full_like(mean, math.sqrt(pooled))
    return mean, deviation.clamp_min(_LEAST)


def log_density(values: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """The log-density of a Gaussian."""
    return -(((values - mean) / deviation) ** 2) / 2 - deviation.log() - math.log(2 * math.pi) / 2


def log_likelihood_ratio(own: Tensor, values: Tensor, inside: Tensor, per_example: bool = True) -> Tensor:
    """(N,) log p(own | in) − log p(own | out), the last line of the paper's Algorithm 1.

    Args:
        own: (N,) the target's φ. values: (K, N) those of the reference models. inside: (K, N) bool.
    """
    with_it, without = (moments(values, chosen, per_example) for chosen in (inside, ~inside))
    return log_density(own, *with_it) - log_density(own, *without)


def deviation_from_out(own: Tensor, values: Tensor, inside: Tensor, per_example: bool = True) -> Tensor:
    """(N,) (own − mean of out) / deviation: orders as the paper's 1 − Pr[Z > own], and keeps its digits in the tail."""
    mean, deviation = moments(values, ~inside, per_example)
    return (own - mean) / deviation


@dataclass(frozen=True, kw_only=True)
class LiRA(ReferenceAttack):
    """What online and offline share.

    Attributes:
        variance: "fixed": pooled over samples; "per-example"; "auto": for every sample from 64 models on.
        queries: views of a sample that are asked about (1 to 18: as it is, mirrored, shifted), taken as independent:
            what they tell is averaged.
    """

    online: ClassVar[bool] = True
    variance: Variance = "auto"
    queries: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_queries(self.queries)
        if self.variance not in ("auto", "fixed", "per-example"):
            raise RobustError(f"variance={self.variance!r} is unknown; use 'auto', 'fixed' or 'per-example'")

    def score(self, evidence: Evidence) -> Tensor:
        """See `MembershipAttack.score`."""
        inside = self.inside(evidence, both=self.online)
        per_example = self.variance == "per-example" or (self.variance == "auto" and len(inside) >= ENOUGH)
        counts = torch.cat([inside.sum(0), (~inside).sum(0)] if self.online else [(~inside).sum(0)])
        if per_example and int(counts.min()) < 2:
            raise RobustError(
                f"{self.name}: a variance for every sample needs two models of a kind, and some have one; "
                "say variance='fixed'"
            )
        rule = log_likelihood_ratio if self.online else deviation_from_out
        found = [
            rule(
                scaled(evidence.logits(query), evidence.y),
                self.values(evidence, scaled, query),
                inside,
                per_example,
            )
            for query in range(self.queries)
        ]
        return torch.stack(found).mean(0)


@dataclass(frozen=True, kw_only=True)
class LiRAOnline(LiRA):
    """LiRA, online (Carlini et al. 2022, arXiv:2112.03570): likelihood ratio of models with and without the sample."""


@dataclass(frozen=True, kw_only=True)
class LiRAOffline(LiRA):
    """LiRA, offline (Carlini et al. 2022, arXiv:2112.03570): only models without the sample, a one-sided test."""

    online: ClassVar[bool] = False
