"""PGD with Adam's steps (Uesato et al. 2018, arXiv:1802.05666; Adam: Kingma & Ba 2015, arXiv:1412.6980)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.engine import setting_of
from robust.attacks.query import Answer
from robust.attacks.rule import State, choose, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.walks import Walk
from robust.losses import get as get_loss

_FIRST, _SECOND = 0.9, 0.999  # Adam's β1 and β2
_TINY = 1e-8  # Adam's ε


class AdamSteps(GradientSteps):
    """x ← Π(x + α · m̂ / (√v̂ + ε)), with Adam's averages m of the gradients and v of their squares.

    Gradients are divided by their dual norm, so that no loss's scale matters, nor how far it is saturated. In linf v is
    kept per coordinate, as Adam's is. Elsewhere it is one number per sample, the squared dual norm: a v per coordinate
    turns every step towards a corner, as linf has it, and falls behind plain PGD.
    """

    def start(self, state: State) -> State:
        """A keyed random point, and averages of nothing."""
        own = super().start(state)
        own["mean"] = torch.zeros_like(state["x"])
        own["square"] = torch.zeros_like(self._square(state, state["x"]))
        return own

    def _square(self, state: State, gradient: Tensor) -> Tensor:
        """Per coordinate (B, C, H, W) in linf, else per sample (B, 1, 1, 1)."""
        ball = self.setting.ball(state)
        return gradient.square() if ball.norm == "linf" else column(ball.dual(gradient).square(), gradient)

    def step(self, state: State, answer: Answer) -> State:
        """One projected Adam step of the rows that have steps left."""
        t = state["t"]
        if answer.gradient is None:
            return {"t": t + 1}
        x, ball = state["x"], self.setting.ball(state)
        gradient = answer.gradient / column(ball.dual(answer.gradient).clamp_min(1e-38), x)
        first = torch.lerp(gradient, state["mean"], _FIRST)
        second = torch.lerp(self._square(state, gradient), state["square"], _SECOND)
        count = column(t.to(x) + 1, x)
        direction = first / (1 - _FIRST**count) / ((second / (1 - _SECOND**count)).sqrt() + _TINY)
        moved = state["at"] + column(self._size(state), x) * direction
        projected = ball.project(moved, x, self.setting.bounds)
        at = choose(t < self.schedule.steps, projected, state["at"])
        return {"t": t + 1, "at": at, "mean": first, "square": second}


@dataclass(frozen=True, kw_only=True)
class PGDAdam(Walk):
    """PGD with Adam's steps from random starts (Uesato et al. 2018, arXiv:1802.05666), on the margin by default.

    Attributes:
        steps: gradients per start.
        step_size: Adam's α in the unit of x; None for eps / 2: Adam shortens its steps itself where they turn.
        restarts: starts, each random.
        loss: a name of `robust.losses`; the margin is the paper's.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    steps: int = 50
    step_size: float | None = None
    restarts: int = 1
    loss: str = "margin"

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        return Schedule(self.steps, 0.5, self.step_size, random_start=True)

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        return AdamSteps(setting_of(trial), self.schedule(), get_loss(self.loss), self.loss == "kl")

    def runs(self) -> int:
        """See `Walk.runs`."""
        return self.restarts
