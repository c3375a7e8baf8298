"""NATTACK: a distribution of adversarial points around a sample (Li et al. 2019, arXiv:1905.00441)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from robust.attacks.blackbox.score import ProbingRule, ScoreAttack, inside
from robust.attacks.phases import PhasedRule, Rows
from robust.attacks.rule import Setting, State, column

_EDGE = 1e-6  # arctanh is infinite at the box's edges


class NAttackRule(ProbingRule):
    """Algorithm 1 of the paper; `at` is the mean μ of the Gaussian, in the space whose tanh is the box.

    What is asked is tanh of a draw, projected on the ball: each draw may be adversarial itself. Draws come in
    antithetic pairs, so that their mean needs no care, and the slope is divided by its own root mean square, which
    does what the paper's standardised losses do.
    """

    def __init__(self, setting: Setting, queries: int, samples: int, sigma: float, rate: float) -> None:
        super().__init__(setting, queries, samples, sigma)
        self.rate = rate

    def start(self, state: State) -> State:
        """The mean of the clean point."""
        own, (low, high) = super().start(state), self.setting.bounds
        share = (2 * (state["x"] - low) / (high - low) - 1).clamp(-1 + _EDGE, 1 - _EDGE)
        own["at"] = share.double().atanh().to(share)  # in float32 its bits depend on the number of rows
        return own

    def directions(self, rows: Rows, count: int) -> Tensor:
        """See `ProbingRule.directions`."""
        x = rows["x"]
        return self.draws(rows, "nattack").normal(count, *x.shape[1:]).to(x)

    def around(self, rows: Rows, moves: Tensor) -> Tensor:
        """See `ProbingRule.around`."""
        low, high = self.setting.bounds
        points = low + (high - low) * ((rows["at"][:, None] + moves).tanh() + 1) / 2
        return inside(self, rows, points)

    def between(self, rows: Rows, points: Tensor) -> Tensor:
        """See `ProbingRule.between`; a direction in the space of the mean, the same as was asked."""
        return self.directions(rows, points.shape[1] // 2)

    def ascend(self, rows: Rows, slope: Tensor) -> State:
        """See `ProbingRule.ascend`."""
        spread = slope.flatten(1).square().mean(1).sqrt().clamp_min(1e-12)
        move = self.rate / (self.sigma * math.sqrt(2 * sum(self.parts)))  # α / (n σ) · √n
        return {"at": rows["at"] + move * slope / column(spread, slope)}


@dataclass(frozen=True, kw_only=True)
class NAttack(ScoreAttack):
    """NATTACK (Li et al. 2019, arXiv:1905.00441): learns the mean of a Gaussian of adversarial points.

    Attributes:
        samples: draws per step, in antithetic pairs; at most a 20th of `queries`.
        sigma: standard deviation of the draws, in the space whose tanh is the box.
        rate: learning rate α of the mean.
    """

    samples: int = 300
    sigma: float = 0.1
    rate: float = 0.02

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `ScoreAttack.rule`."""
        self.positive("samples", "sigma", "rate")
        return NAttackRule(setting, self.queries, self.samples, self.sigma, self.rate)
