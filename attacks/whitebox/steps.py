"""The rule that FGSM, BIM, PGD and MI-FGSM share: steps along a direction, each projected on ball ∩ box."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, choose
from robust.cuda_ops import momentum
from robust.losses import Loss


@dataclass(frozen=True)
class Schedule:
    """How a gradient method walks.

    Attributes:
        steps: gradients per start.
        relative_step: step size as a fraction of eps, where `step_size` is None.
        step_size: in the unit of x.
        random_start: from a random point of the ball instead of the clean one.
        decay: momentum of the l1-normalised gradient (MI-FGSM's μ); 0 for none.
        copies: forwards a gradient is averaged over.
    """

    steps: int
    relative_step: float
    step_size: float | None = None
    random_start: bool = False
    decay: float = 0.0
    copies: int = 1


class GradientSteps(Rule):
    """x ← Π(x + α · steepest(g)); the last point is checked too."""

    scouted = steady = looks_last = True

    def __init__(self, setting: Setting, schedule: Schedule, loss: Loss, reference: bool = False) -> None:
        super().__init__(setting)
        self.schedule, self.loss = schedule, loss
        self.steps = schedule.steps + 1
        self.needs_reference = reference

    def start(self, state: State) -> State:
        """The clean point, or a keyed random one; restarts beyond the first are always random."""
        x = state["x"]
        own = super().start(state)
        own["at"] = x.clone()
        if self.schedule.random_start:
            own["at"] = self.setting.ball(state).random(
                x, self.setting.bounds, self.setting.draws(state, "start")
            )
        if self.schedule.decay:
            own["momentum"] = torch.zeros_like(x)
        return own

    def query(self, state: State) -> Query:
        """Gradients, except where every row only checks its last point."""
        return Query(
            state["at"], "logits" if self.ending(state) else "loss_grad", self.schedule.copies, self.loss
        )

    def step(self, state: State, answer: Answer) -> State:
        """One projected step of the rows that have steps left."""
        t = state["t"]
        changed: State = {"t": t + 1}
        if answer.gradient is None:
            return changed
        direction = answer.gradient
        if self.schedule.decay:
            direction = momentum(direction, state["momentum"], self.schedule.decay)
            changed["momentum"] = direction
        ball = self.setting.ball(state)
        moved = ball.step(state["at"], direction, self._size(state), state["x"], self.setting.bounds)
        changed["at"] = choose(t < self.schedule.steps, moved, state["at"])
        return changed

    def _size(self, state: State) -> Tensor:
        if self.schedule.step_size is not None:
            return torch.full((len(state["x"]),), self.schedule.step_size, device=state["x"].device)
        return self.setting.eps(state).flatten() * self.schedule.relative_step
