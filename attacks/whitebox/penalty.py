"""Minimum-norm searches by a penalty: distance + c · f in phases, between which every row bisects its own c."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.rule import Rule, Setting, State, choose
from robust.attacks.trial import Trial
from robust.errors import RobustError
from robust.losses import get as get_loss

_LOOKS = 10  # times in a phase that an early abort is considered
_STALLED = 0.9999  # of the smallest objective at a look: what stays above it has come to rest


@dataclass(frozen=True)
class Search:
    """How a penalty method searches.

    Attributes:
        steps: gradients per phase.
        search_steps: phases, each with another c.
        step_size: of the optimiser.
        initial_c: the first c; tenfold until a phase succeeds, then bisected.
        confidence: the margin κ that counts as success and beyond which f is 0.
        patience: looks at which the objective may have come to rest before its phase ends; 0 for no such end.
    """

    steps: int
    search_steps: int
    step_size: float
    initial_c: float
    confidence: float
    patience: int


class PenaltyRule(Rule):
    """Phases of at most `steps` iterations; a row's phase ends by itself, and its next one starts afresh.

    Attributes:
        window: a phase has succeeded if one of so many last points of it was adversarial.
        thorough: whether a phase that has succeeded is never aborted.
    """

    feasible = False

    def __init__(self, setting: Setting, search: Search) -> None:
        super().__init__(setting)
        self.search = search
        self.steps = search.steps * search.search_steps
        self.margin = get_loss("margin")
        self.every = -(-search.steps // _LOOKS)
        self.window, self.thorough = search.steps, False

    def start(self, state: State) -> State:
        """The first phase."""
        own = super().start(state)
        zero = torch.zeros(len(state["x"]), device=state["x"].device)
        own |= {"c": zero + self.search.initial_c, "low": zero.clone(), "high": zero + torch.inf}
        own |= {"phase": torch.zeros_like(own["t"]), **self._clock(zero)}
        return own | self.fresh({**state, **own})

    def fresh(self, state: State) -> State:
        """The variables at a phase's beginning."""
        raise TypeError(f"{type(self).__name__} has no variables")

    def _clock(self, zero: Tensor) -> State:
        none = torch.zeros_like(zero, dtype=torch.long)
        never = none - 2 * self.search.steps
        return {"k": none, "seen": never, "mark": zero + torch.inf, "stalls": none.clone()}

    def lacking(self, margin: Tensor) -> Tensor:
        """(B,) f = max(κ − margin, 0): what is missing to the margin that is wanted."""
        return (self.search.confidence - margin).clamp_min(0)

    def iterated(self, state: State, moved: State, objective: Tensor, margin: Tensor) -> State:
        """The state after an iteration: `moved` has its variables; rows whose phase is over begin the next one.

        Args:
            objective: (B,) what the iteration found the penalised distance to be; margin: (B,) of the model.
        """
        k = state["k"] + 1
        reached = (margin > 0) & (margin >= self.search.confidence)
        seen = torch.where(reached, k, state["seen"])
        won = k - seen < self.window
        look, mark = k % self.every == 0, state["mark"]
        stalls = torch.where(objective > _STALLED * mark, state["stalls"] + 1, 0)
        on = {
            **moved,
            "k": k,
            "seen": seen,
            "mark": torch.where(look, torch.minimum(objective, mark), mark),
            "stalls": torch.where(look, stalls, state["stalls"]),
        }
        over = k >= self.search.steps
        if self.search.patience:
            over = over | ((on["stalls"] >= self.search.patience) & ~(won & self.thorough))
        anew = self._clock(torch.zeros_like(objective)) | bisected(state, won) | self.fresh(state)
        anew["phase"] = state["phase"] + 1
        after = {name: choose(over, value, on.get(name, state[name])) for name, value in anew.items()}
        return {**on, **after, "t": state["t"] + 1}

    def done(self, state: State) -> Tensor:
        """Rows that have had their phases."""
        return state["phase"] >= self.search.search_steps


def bisected(state: State, won: Tensor) -> State:
    """The next c and its bounds: smaller after a success, larger after a failure, tenfold before any success."""
    c = state["c"]
    high, low = torch.where(won, c, state["high"]), torch.where(won, state["low"], c)
    return {"c": torch.where(high.isinf(), c * 10, (low + high) / 2), "low": low, "high": high}


def adam(state: State, gradient: Tensor, k: Tensor, rate: Tensor | float) -> tuple[Tensor, State]:
    """Adam's step (Kingma & Ba 2015, arXiv:1412.6980) and its moments `m` and `v`.

    Args:
        k: (B,) steps before this one; rate: one number, or one per row that broadcasts with the gradient.
    """
    m = torch.lerp(gradient, state["m"], 0.9)
    v = torch.lerp(gradient.square(), state["v"], 0.999)
    count = (k + 1).to(gradient).view(-1, *[1] * (gradient.dim() - 1))
    step = -rate * (m / (1 - 0.9**count)) / ((v / (1 - 0.999**count)).sqrt() + 1e-8)
    return step, {"m": m, "v": v}


@dataclass(frozen=True, kw_only=True)
class PenaltyAttack(Attack):
    """What the methods that bisect a penalty's weight have in common.

    Attributes:
        steps: the most gradients per phase.
        search_steps: phases, each with another c.
        step_size: of the optimiser; None for 0.01, or 0.2 / steps if that is more.
        initial_c: the first weight c of the model's part; tenfold until a phase succeeds, then bisected.
        confidence: the margin κ that the search aims at, at least 0. In "smallest" the nearest adversarial point
            counts whatever its margin is; in "strongest" the point of the largest margin.
        patience: looks, ten a phase, at which the objective may have come to rest before the phase ends: Adam's first
            steps always overshoot. The authors' code has 1, which takes a third of the time; 0 for no such end.
    """

    minimum_norm: ClassVar[bool] = True
    passes_per_step: ClassVar[int] = 3
    until: Until = "smallest"
    steps: int = 100
    search_steps: int = 6
    step_size: float | None = None
    initial_c: float = 0.01
    confidence: float = 0.0
    patience: int = 3

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or self.search_steps < 1 or self.patience < 0:
            raise RobustError(
                f"steps={self.steps}, search_steps={self.search_steps}, patience={self.patience}: "
                "at least 1, 1 and 0"
            )
        size = max(0.01, 0.2 / self.steps) if self.step_size is None else self.step_size
        if not (size > 0 and self.initial_c > 0 and self.confidence >= 0):
            raise RobustError(
                f"step_size={size}, initial_c={self.initial_c}, confidence={self.confidence}: "
                "positive, positive, and at least 0"
            )
        limits = (self.steps, self.search_steps, size, self.initial_c, self.confidence, self.patience)
        self.search(trial, Search(*limits))

    def search(self, trial: Trial, search: Search) -> None:
        """Runs the method's rule."""
        raise TypeError(f"{type(self).__name__} does not say how it searches")

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`."""
        steps, phases = chosen.get("steps", cls.steps), chosen.get("search_steps", cls.search_steps)
        return float(cls.passes_per_step * steps * phases)
