"""Carlini & Wagner's minimum-norm attacks (arXiv:1608.04644): distance plus c · f in a box without edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, choose, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.minimum import cosine
from robust.attacks.whitebox.penalty import PenaltyAttack, PenaltyRule, Search, adam
from robust.errors import RobustError
from robust.losses import get as get_loss
from robust.threat import Bounds

_FIRST = 0.02  # of the box's width: what the steps of C&W linf are a part of before there is a τ to speak of
_NEARER = 0.999  # of the distance before: what counts as nearer
_EDGE = 0.999999  # of the box's half width: where the change of variable ends


def unbounded(x: Tensor, bounds: Bounds) -> Tensor:
    """The w of a point x = middle + half · tanh(w); in float64, whose rounding does not depend on the batch."""
    middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    return torch.atanh((x.double() - middle) / half * _EDGE).to(x.dtype)


def boxed(w: Tensor, bounds: Bounds) -> Tensor:
    """The point of the box that w stands for."""
    middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    return torch.tanh(w).mul_(half).add_(middle).clamp_(*bounds)


def chained(gradient: Tensor, at: Tensor, bounds: Bounds) -> Tensor:
    """A gradient with respect to x = middle + half · tanh(w) as one with respect to w; at: x."""
    middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
    return gradient * (half - (at - middle).square() / half)


class CWL2Rule(PenaltyRule):
    """Section 6.1 of the paper: Adam on ‖x' − x‖² + c · f(x'), from the clean point in every phase.

    A phase succeeds by its last fifth. The authors' code counts any point of it; but Adam, which normalises its steps,
    passes over a near boundary on its way, be c ever so small, and c is bisected towards 0, where nothing is found.
    For the same reason the step size, which the authors' code keeps, falls over a phase that has crossed the boundary.
    """

    def __init__(self, setting: Setting, search: Search, last_share: float) -> None:
        super().__init__(setting, search)
        self.window, self.last_share = 2 * self.every, last_share

    def start(self, state: State) -> State:
        """The clean point in the new variable."""
        return {**super().start(state), "origin": unbounded(state["x"], self.setting.bounds)}

    def fresh(self, state: State) -> State:
        """No shift from the clean point, no momentum."""
        zero = torch.zeros_like(state["x"])
        return {"shift": zero, "m": zero.clone(), "v": zero.clone(), "at": state["x"].clone()}

    def query(self, state: State) -> Query:
        """The margin and its gradient."""
        return Query(state["at"], "loss_grad", loss=self.margin)

    def step(self, state: State, answer: Answer) -> State:
        """One step of Adam."""
        assert answer.loss is not None
        assert answer.gradient is not None
        at, c = state["at"], state["c"]
        delta, lacking = at - state["x"], self.lacking(answer.loss)
        pull = column(c * (lacking > 0), at)
        gradient = chained(2 * delta - pull * answer.gradient, at, self.setting.bounds)
        falling = cosine(1.0, self.last_share, state["k"], self.search.steps)
        size = self.search.step_size * torch.where(state["seen"] < 0, 1.0, falling)
        move, moments = adam(state, gradient, state["k"], column(size, at))
        shift = state["shift"] + move
        moved = {**moments, "shift": shift, "at": boxed(state["origin"] + shift, self.setting.bounds)}
        objective = delta.flatten(1).square().sum(1) + c * lacking
        return self.iterated(state, moved, objective, answer.loss)


@dataclass(frozen=True, kw_only=True)
class CWL2(PenaltyAttack):
    """C&W l2 (Carlini & Wagner 2017, arXiv:1608.04644): Adam on the squared distance plus c times the margin loss.

    The points are tanh(w) in the box; c is bisected per sample, over phases that each start from the clean point.

    Attributes:
        steps: the most gradients per phase; the paper takes 10,000.
        search_steps: phases, each with another c; the authors' code has 9, from c = 0.001.
        step_size: Adam's learning rate, in the unit of w; None for 0.01, or 0.2 / steps if that is more.
        initial_c: the first weight c of the model's part; tenfold until a phase succeeds, then bisected.
        confidence: the margin κ that the search aims at, at least 0. In "smallest" the nearest adversarial point
            counts whatever its margin is; in "strongest" the point of the largest margin.
        patience: looks, ten a phase, at which the objective may have come to rest before the phase ends; the authors'
            code has 1, which takes a third of the time and finds larger perturbations; 0 for no such end.
        last_share: what is left of the step size at a phase's end, in (0, 1], once a point of it was adversarial; a
            half cosine leads there. 1 keeps it, as the authors' code does: a sixth larger in phases of 20 steps.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    last_share: float = 0.05

    def search(self, trial: Trial, search: Search) -> None:
        """See `PenaltyAttack.search`."""
        if not 0 < self.last_share <= 1:
            raise RobustError(f"last_share={self.last_share} must be in (0, 1]")
        run_rule(CWL2Rule(setting_of(trial), search, self.last_share), trial, make_jobs(trial))


class CWLinfRule(Rule):
    """Section 6.3 of the paper: Adam on c · f(x') + Σ max(|δᵢ| − τ, 0), under a τ that shrinks.

    Every adversarial point that is nearer than those before makes τ a part of its distance. Where none comes for some
    steps, c is raised and the search goes back to the nearest point; after the largest c, τ shrinks by half as much.
    Until a first one is found the pace doubles instead.
    """

    feasible = False

    def __init__(self, setting: Setting, attack: CWLinf) -> None:
        super().__init__(setting)
        self.attack, self.steps, self.margin = attack, attack.steps, get_loss("margin")
        self.width = setting.bounds[1] - setting.bounds[0]
        self.hurry = max(1, min(attack.patience, attack.steps // 25))  # few steps, too, must cross the box

    def start(self, state: State) -> State:
        """The clean point in the new variable; τ is eps, or the box's width where that is less."""
        x, own = state["x"], super().start(state)
        zero, one = torch.zeros_like(x), torch.ones(len(x), device=x.device)
        own |= {
            "origin": unbounded(x, self.setting.bounds),
            "at": x.clone(),
            "shift": zero,
            "base": zero.clone(),
        }
        own |= {"m": zero.clone(), "v": zero.clone(), "n": own["t"].clone(), "since": own["t"].clone()}
        own |= {
            "c": one * self.attack.initial_c,
            "shrink": one * self.attack.shrink,
            "reach": one * torch.inf,
        }
        own["tau"] = self.setting.eps(state).flatten().clamp_max(self.width).clone()
        own["pace"] = one * _FIRST * self.width
        return own

    def query(self, state: State) -> Query:
        """The margin and its gradient; only the margin of every row's last point."""
        return Query(state["at"], "logits" if self.ending(state) else "loss_grad", loss=self.margin)

    def step(self, state: State, answer: Answer) -> State:
        """One step of Adam; τ and c follow what was found."""
        assert answer.loss is not None
        t = state["t"] + 1
        if answer.gradient is None:
            return {"t": t}
        at, bounds = state["at"], self.setting.bounds
        delta, lacking = at - state["x"], (self.attack.confidence - answer.loss).clamp_min(0)
        beyond = delta.abs() > column(state["tau"], at)
        pull = column(state["c"] * (lacking > 0), at)
        gradient = chained(delta.sign() * beyond - pull * answer.gradient, at, bounds)
        rate = column(state["pace"], at) * (2 * self.attack.step_size / self.width)
        move, moments = adam(state, gradient, state["n"], rate)
        moved = {**moments, "shift": state["shift"] + move, "n": state["n"] + 1}
        size = delta.abs().flatten(1).amax(1)
        nearer = (answer.loss > 0) & (lacking <= 0) & (size < _NEARER * state["reach"])
        after = self._followed(state, moved, nearer, size)
        return {**after, "at": boxed(state["origin"] + after["shift"], bounds), "t": t}

    def _followed(self, state: State, moved: State, nearer: Tensor, size: Tensor) -> State:
        """The rows' variables after a step; those that have waited too long begin anew.

        Args:
            nearer: (B,) rows whose point was adversarial and nearer than any before, at the distance `size` (B,).
        """
        since = torch.where(nearer, 0, state["since"] + 1)
        unseen = state["reach"].isinf() & ~nearer
        late = since >= torch.where(unseen, self.hurry, self.attack.patience)
        raised = state["c"] * 10
        stuck = late & (raised > self.attack.largest_c)
        reach = torch.where(nearer, size, state["reach"])
        shrink = torch.where(stuck & ~unseen, (1 + state["shrink"]) / 2, state["shrink"])
        tau = torch.where((nearer | stuck) & ~unseen, reach * shrink, state["tau"])
        base = choose(nearer, state["shift"], choose(unseen, moved["shift"], state["base"]))
        zero = torch.zeros_like(base)
        anew = {"shift": base, "m": zero, "v": zero, "n": torch.zeros_like(since)}
        return {
            **{name: choose(late, value, moved[name]) for name, value in anew.items()},
            "since": torch.where(late, 0, since),
            "c": torch.where(late, torch.where(stuck, self.attack.initial_c, raised), state["c"]),
            "pace": torch.where(unseen, state["pace"] * (1 + late.float()), tau),
            "base": base,
            "reach": reach,
            "shrink": shrink,
            "tau": tau,
        }


@dataclass(frozen=True, kw_only=True)
class CWLinf(Attack):
    """C&W linf (Carlini & Wagner 2017, arXiv:1608.04644): a penalty on changes beyond a threshold that shrinks.

    Departures from the paper: Adam's steps are a part of the threshold τ, which may be far below any fixed one; τ
    follows each nearer adversarial point at once, without a restart; after a failure it shrinks by less, and the
    search goes on to the end of its steps.

    Attributes:
        steps: points per sample; all but the last take a gradient.
        patience: steps without a nearer adversarial point, after which c is raised.
        step_size: Adam's learning rate, as a part of τ.
        initial_c: the first weight c of the model's part at every τ; tenfold after each failure.
        largest_c: beyond it τ cannot be reached.
        shrink: what τ shrinks to, as a part of the last distance, in (0, 1).
        confidence: the margin κ that the search aims at, at least 0. In "smallest" the nearest adversarial point
            counts whatever its margin is; in "strongest" the point of the largest margin.
    """

    minimum_norm: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf",)
    until: Until = "smallest"
    steps: int = 500
    patience: int = 20
    step_size: float = 0.1
    initial_c: float = 0.1
    largest_c: float = 20.0
    shrink: float = 0.9
    confidence: float = 0.0

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or self.patience < 1 or not 0 < self.shrink < 1:
            raise RobustError(
                f"steps={self.steps}, patience={self.patience}, shrink={self.shrink}: 1, 1, and in (0, 1)"
            )
        if not (self.step_size > 0 and self.largest_c >= self.initial_c > 0 and self.confidence >= 0):
            raise RobustError(
                f"step_size={self.step_size}, initial_c={self.initial_c}, largest_c={self.largest_c}, "
                f"confidence={self.confidence}: positive, positive, no less, and at least 0"
            )
        run_rule(CWLinfRule(setting_of(trial), self), trial, make_jobs(trial))
