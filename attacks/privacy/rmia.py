"""RMIA: how many samples of a population does a sample beat in likelihood ratio? (Zarifzadeh et al. 2024)

The score of x is Pr_z[(Pr(x|θ) / Pr(x)) / (Pr(z|θ) / Pr(z)) ≥ γ] over samples z (arXiv:2312.03262), with Pr(x) from
reference models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust.attacks.privacy.base import ReferenceAttack, require_queries
from robust.attacks.privacy.signals import probability, taylor
from robust.errors import RobustError
from robust.membership import Evidence
from robust.roc import roc

USUAL_A = 0.3  # the paper's for CIFAR-10
GRID = tuple(k / 10 for k in range(11))
_LEAST = 1e-300
Signal = Callable[[Tensor, Tensor], Tensor]


def marginal(values: Tensor, inside: Tensor, a: float | None) -> Tensor:
    """(N,) Pr(x): averaged over models with and without the sample, half each, or from those without it alone.

    Args:
        values: (K, N) Pr(x|θ') by reference model. inside: (K, N) bool.
        a: None for both kinds (online); else the paper's offline approximation ((1 + a) Pr(x)_out + 1 − a) / 2, which
            follows from the line Pr(x)_in = a Pr(x)_out + 1 − a.
    """
    out = _mean(values, ~inside)
    with_it = _mean(values, inside) if a is None else a * out + (1 - a)
    return (with_it + out) / 2


def beaten(ratio: Tensor, others: Tensor, gamma: float) -> Tensor:
    """(N,) the part of `others` (M,), the population's ratios, that `ratio` (N,) is at least `gamma` times."""
    return torch.searchsorted(others.sort().values, ratio / gamma, right=True).double() / len(others)


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    return (values * chosen).sum(0) / chosen.sum(0)


@dataclass(frozen=True, kw_only=True)
class RMIA(ReferenceAttack):
    """RMIA (Zarifzadeh et al. 2024, arXiv:2312.03262): robust with few reference models, offline by default.

    Attributes:
        mode: "offline": models without the sample only; "online": with it too.
        gamma: what a ratio has to exceed another by, at least 1. Over a given population the score grows with the
            sample's own ratio, so that gamma decides about ties only; 1, where the paper has 2, leaves the fewest: on a
            model that is hardly sure of anything no ratio is twice another.
        a: offline: how Pr(x) of models with the sample follows from those without; None: the one that attacks the
            reference models best, where there are four or more, else 0.3.
        signal: Pr(x|θ): "softmax", or "taylor", the paper's soft-margin Taylor softmax.
        queries: views of a sample (1 to 18) whose scores are averaged.

    The population is the evidence's, or the samples themselves where there is none.
    """

    mode: Literal["offline", "online"] = "offline"
    gamma: float = 1.0
    a: float | None = None
    signal: Literal["softmax", "taylor"] = "softmax"
    queries: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_queries(self.queries)
        if self.mode not in ("offline", "online"):
            raise RobustError(f"mode={self.mode!r} is unknown; use 'offline' or 'online'")
        if self.signal not in ("softmax", "taylor"):
            raise RobustError(f"signal={self.signal!r} is unknown; use 'softmax' or 'taylor'")
        if not self.gamma >= 1 or (self.a is not None and not 0 <= self.a <= 1):
            raise RobustError(f"gamma={self.gamma}, a={self.a}: gamma is at least 1, and a in [0, 1]")

    def score(self, evidence: Evidence) -> Tensor:
        """See `MembershipAttack.score`."""
        inside = self.inside(evidence, both=self.mode == "online")
        signal: Signal = probability if self.signal == "softmax" else taylor
        values = self.values(evidence, signal)
        a = None if self.mode == "online" else self._slope(values, inside)
        if evidence.population is None:
            own = signal(evidence.logits(), evidence.y)
            others = own / marginal(values, inside, a).clamp_min(_LEAST)
        else:
            others = self._population(evidence, signal, a)
        found = []
        for query in range(self.queries):
            own = signal(evidence.logits(query), evidence.y)
            asked = values if query == 0 else self.values(evidence, signal, query)
            found.append(beaten(own / marginal(asked, inside, a).clamp_min(_LEAST), others, self.gamma))
        return torch.stack(found).mean(0)

    def _population(self, evidence: Evidence, signal: Signal, a: float | None) -> Tensor:
        """(M,) the ratios of the population."""
        assert evidence.population is not None
        assert evidence.references is not None
        labels = evidence.population[1].cpu()
        count = len(evidence.inside[: self.references])
        values = torch.stack([signal(evidence.population_logits(k), labels) for k in range(count)])
        inside = evidence.references.population_inside
        inside = torch.zeros_like(values, dtype=torch.bool) if inside is None else inside[:count].cpu()
        line = USUAL_A if a is None and not bool(inside.any(0).all()) else a
        return signal(evidence.population_logits(), labels) / marginal(values, inside, line).clamp_min(_LEAST)

    def _slope(self, values: Tensor, inside: Tensor) -> float:
        """The offline slope: the one given, or the one with the best mean AUC with each reference as the target."""
        if self.a is not None:
            return self.a
        enough = [k for k in range(len(inside)) if not bool(_without(inside, k).all(0).any())]
        if len(inside) < 4 or not enough:
            return USUAL_A
        tried = enough[:8]  # more pretended targets hardly move the choice

        def area(a: float) -> float:
            total = 0.0
            for k in tried:
                ratio = values[k] / marginal(_without(values, k), _without(inside, k), a).clamp_min(_LEAST)
                total += roc(ratio[~inside[k]].numpy(), ratio[inside[k]].numpy()).auc
            return total

        return max(GRID, key=area)


def _without(rows: Tensor, k: int) -> Tensor:
    return torch.cat([rows[:k], rows[k + 1 :]])
