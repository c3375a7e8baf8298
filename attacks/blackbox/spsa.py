"""Simultaneous perturbation stochastic approximation with Adam (Uesato et al. 2018, arXiv:1802.05666)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.blackbox.score import ProbingRule, ScoreAttack, step_sizes
from robust.attacks.phases import PhasedRule, Rows
from robust.attacks.rule import Setting, State, column

_FIRST, _SECOND, _TINY = 0.9, 0.999, 1e-8  # Adam's decays and its ε
_STEP = 0.3  # of eps: the paper's 0.01 at 8/255


class SPSARule(ProbingRule):
    """Algorithm 1 of the paper: Rademacher pairs around the iterate, and projected steps of Adam."""

    def __init__(
        self, setting: Setting, queries: int, samples: int, sigma: float, step_size: float | None
    ) -> None:
        super().__init__(setting, queries, samples, sigma)
        self.step_size = step_size

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        size = step_sizes(self, state, self.step_size, _STEP)
        whole = self.setting.ball(state).length(torch.ones_like(x)).to(x)  # of a move by one everywhere
        own |= {"mean": torch.zeros_like(x), "square": torch.zeros_like(x), "size": size / whole}
        return own | {"round": torch.zeros(len(x), device=x.device)}

    def directions(self, rows: Rows, count: int) -> Tensor:
        """See `ProbingRule.directions`."""
        x = rows["x"]
        return self.draws(rows, "spsa").signs(count, *x.shape[1:]).to(x)

    def ascend(self, rows: Rows, slope: Tensor) -> State:
        """See `ProbingRule.ascend`."""
        slope = slope / sum(self.parts)
        turns = rows["round"] + 1
        first = _FIRST * rows["mean"] + (1 - _FIRST) * slope
        second = _SECOND * rows["square"] + (1 - _SECOND) * slope.square()
        mean = first / column(1 - _FIRST**turns, slope)
        spread = (second / column(1 - _SECOND**turns, slope)).sqrt()
        moved = rows["at"] + column(rows["size"], slope) * mean / (spread + _TINY)
        at = self.ball(rows).project(moved, rows["x"], self.setting.bounds)
        return {"mean": first, "square": second, "round": turns, "at": at}


@dataclass(frozen=True, kw_only=True)
class SPSA(ScoreAttack):
    """SPSA (Uesato et al. 2018, arXiv:1802.05666): gradients from Rademacher directions, steps of Adam.

    Attributes:
        samples: points per gradient, in pairs; at most a 20th of `queries`. The paper takes up to 8192.
        sigma: how far each coordinate of a point is from the iterate, the paper's δ.
        step_size: length in the threat's norm of a step by one rate everywhere; None for 0.3 · eps, the paper's 0.01 at
            8/255.
    """

    samples: int = 128
    sigma: float = 0.01
    step_size: float | None = None

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `ScoreAttack.rule`."""
        self.positive("samples", "sigma", "step_size")
        return SPSARule(setting, self.queries, self.samples, self.sigma, self.step_size)
