"""EAD: elastic-net attacks, sparse changes by iterative shrinkage and thresholding (arXiv:1709.04114)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Setting, State, choose, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.penalty import PenaltyAttack, PenaltyRule, Search
from robust.errors import RobustError
from robust.threat import L1, Bounds


def shrunk(z: Tensor, x: Tensor, beta: float, bounds: Bounds) -> Tensor:
    """The paper's S_β (eq. 5): z − x with every coordinate β nearer to 0, and x + that cut to the box."""
    return (x + torch.nn.functional.softshrink(z - x, beta)).clamp_(*bounds)


@dataclass(frozen=True, eq=False)
class ElasticNet(L1):
    """A ball of l1 whose distances are β‖δ‖₁ + ‖δ‖₂²: what the decision rule "en" calls near."""

    beta: float = 0.0

    def _length(self, delta: Tensor) -> Tensor:
        wide = delta.double()
        return self.beta * wide.abs().sum(1) + wide.square().sum(1)


class EADRule(PenaltyRule):
    """Algorithm 1 of the paper: FISTA on c · f(x') + ‖x' − x‖₂² + β‖x' − x‖₁.

    Turns alternate: a gradient at the extrapolated point, and a check of the shrunk point that comes of it.
    """

    passes = 4

    def __init__(self, setting: Setting, search: Search, beta: float) -> None:
        super().__init__(setting, search)
        self.beta = beta
        self.checking, self.thorough = False, True

    def fresh(self, state: State) -> State:
        """The clean point, not moved yet."""
        x = state["x"]
        still = torch.zeros_like(state["hit"])
        zero = torch.zeros(len(x), device=x.device)
        return {"at": x.clone(), "ahead": x.clone(), "moved": still, "objective": zero}

    def query(self, state: State) -> Query:
        """The margin: of the shrunk point in a check, else of the extrapolated one, with its gradient.

        As in the paper the extrapolated point may lie outside the box; it then counts for nothing but its gradient.
        """
        if self.checking:
            return Query(state["at"], "logits", loss=self.margin)
        return Query(state["ahead"], "loss_grad", loss=self.margin)

    def step(self, state: State, answer: Answer) -> State:
        """After a gradient one step of FISTA; after a check the count of the iteration."""
        assert answer.loss is not None
        self.checking = answer.gradient is not None
        if answer.gradient is not None:
            return self._moved(state, answer.loss, answer.gradient)
        after = self.iterated(state, {}, state["objective"], answer.loss)
        return {name: choose(state["moved"], value, state[name]) for name, value in after.items()}

    def _moved(self, state: State, margin: Tensor, gradient: Tensor) -> State:
        x, ahead, c, k = state["x"], state["ahead"], state["c"], state["k"].to(margin)
        delta, lacking = ahead - x, self.lacking(margin)
        slope = 2 * delta - column(c * (lacking > 0), x) * gradient
        size = self.search.step_size * (1 - k / self.search.steps).clamp_min(0).sqrt()
        at = shrunk(ahead - column(size, x) * slope, x, self.beta, self.setting.bounds)
        flat = delta.flatten(1)
        objective = flat.square().sum(1) + self.beta * flat.abs().sum(1) + c * lacking
        ahead = at + column(k / (k + 3), x) * (at - state["at"])
        return {"at": at, "ahead": ahead, "objective": objective, "moved": torch.ones_like(state["moved"])}


@dataclass(frozen=True, kw_only=True)
class EAD(PenaltyAttack):
    """EAD (Chen et al. 2018, arXiv:1709.04114): elastic-net minimum l1, sparser than Carlini & Wagner's l2.

    FISTA minimises c times the margin loss plus ‖δ‖₂² + β‖δ‖₁; c is bisected per sample as in C&W. Only phases that
    have not succeeded are aborted: the last steps, which are the smallest, make a change sparse.

    Attributes:
        steps: the most gradients per phase; the paper takes 1,000. Each comes with a check.
        search_steps: phases, each with another c; the authors' code has 9, from c = 0.001.
        step_size: of FISTA's first step, in the unit of x; it falls with the square root of the steps left.
        initial_c: the first weight c of the model's part; tenfold until a phase succeeds, then bisected.
        confidence: the margin κ that the search aims at, at least 0. In "smallest" the nearest adversarial point
            counts whatever its margin is; in "strongest" the point of the largest margin.
        patience: looks, ten a phase, at which the objective may have come to rest before a phase that has not succeeded
            ends; 0 for no such end. FISTA does not overshoot as C&W's Adam does, so one is enough.
        beta: the weight of ‖δ‖₁, which each step shrinks every coordinate's change by, as a part of the box's width.
        decision: which adversarial point counts as the nearest: "l1": in l1; "en": by ‖δ‖₂² + β‖δ‖₁.
    """

    norms: ClassVar[tuple[str, ...]] = ("l1",)
    passes_per_step: ClassVar[int] = 4
    step_size: float | None = 0.01
    patience: int = 1
    beta: float = 1e-3
    decision: str = "l1"

    def search(self, trial: Trial, search: Search) -> None:
        """See `PenaltyAttack.search`."""
        if self.decision not in ("l1", "en") or not self.beta >= 0:
            raise RobustError(f"decision={self.decision!r}, beta={self.beta}: 'l1' or 'en', and at least 0")
        beta = self.beta * (trial.bounds[1] - trial.bounds[0])
        rule = EADRule(setting_of(trial), search, beta)
        if self.decision == "l1" or self.until != "smallest":
            run_rule(rule, trial, make_jobs(trial))
            return
        rows = torch.arange(len(trial.x), device=trial.x.device)
        other = trial.part(replace(self, threat=ElasticNet(self.threat.eps, beta=beta)), rows)
        other.track = trial.track
        other.searching()
        run_rule(rule, other, make_jobs(other))
        trial.absorb(rows, other)
