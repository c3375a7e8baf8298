"""What methods share that look for the smallest perturbation with one gradient per step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State
from robust.attacks.trial import Trial
from robust.classifier import misclassified
from robust.errors import RobustError
from robust.losses import Loss


def cosine(first: float, last: float, t: Tensor, steps: int) -> Tensor:
    """(B,) cosine annealing from `first` at t = 0 to `last` at t = steps."""
    return last + (first - last) / 2 * (1 + torch.cos(math.pi * t.clamp_max(steps) / steps))


def corner(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """The point of the box that is farthest from x, in every norm."""
    low, high = bounds
    return torch.where(x < (low + high) / 2, high, low).to(x)


class MinimumRule(Rule):
    """Gradients of a loss at the iterate `at`, which starts at the clean point; the last iterate is checked too."""

    feasible = False
    steady = True

    def __init__(self, setting: Setting, steps: int, loss: Loss) -> None:
        super().__init__(setting)
        self.gradients, self.loss = steps, loss
        self.steps = steps + 1

    def start(self, state: State) -> State:
        """The clean point."""
        own = super().start(state)
        own["at"] = state["x"].clone()
        return own

    def query(self, state: State) -> Query:
        """Gradients, except where every row only checks its last point."""
        return Query(state["at"], "logits" if self.ending(state) else "loss_grad", loss=self.loss)

    def step(self, state: State, answer: Answer) -> State:
        """One step of the method."""
        changed: State = {"t": state["t"] + 1}
        if answer.gradient is None or answer.loss is None:
            return changed
        target = state["target"] if self.setting.targeted else None
        hit = misclassified(answer.scores, state["y"], target)
        return changed | self.move(state, hit, answer.loss, answer.gradient)

    def move(self, state: State, hit: Tensor, loss: Tensor, gradient: Tensor) -> State:
        """The next iterate `at` and what else changes; hit (B,): the iterate is adversarial."""
        raise TypeError(f"{type(self).__name__} does not move")


@dataclass(frozen=True, kw_only=True)
class MinimumAttack(Attack):
    """What their attacks have in common: one run per sample, the smallest distance kept.

    Attributes:
        steps: gradients.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    minimum_norm: ClassVar[bool] = True
    until: Until = "smallest"
    steps: int = 100

    def rule(self, trial: Trial, setting: Setting) -> Rule:
        """The method's rule with this attack's fields."""
        raise TypeError(f"{type(self).__name__} has no rule")

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1:
            raise RobustError(f"steps={self.steps} is no search; give at least 1")
        run_rule(self.rule(trial, setting_of(trial)), trial, make_jobs(trial))
