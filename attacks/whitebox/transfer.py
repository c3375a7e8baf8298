"""What the attacks share that were made to transfer: momentum steps along gradients taken elsewhere, or reshaped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from robust.attacks.engine import setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Setting, State, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.walks import Walk
from robust.errors import RobustError
from robust.losses import Loss
from robust.losses import get as get_loss
from robust.threat import Bounds


def black(bounds: Bounds) -> float:
    """Zero, which these papers scale and pad images with, or what is nearest to it in the box."""
    return min(max(0.0, bounds[0]), bounds[1])


class TransferSteps(GradientSteps):
    """Momentum steps whose gradient is taken at points of the subclass's choice.

    Where none of them is the iterate, a turn of gradients takes turns with one that only checks the iterates: the
    result never loses to a point that was passed.

    Attributes:
        apart: whether the iterates have to be checked so.
    """

    feasible = steady = False
    apart = True

    def __init__(
        self, setting: Setting, schedule: Schedule, loss: Loss, reference: bool, points: int = 1
    ) -> None:
        super().__init__(setting, schedule, loss, reference)
        self.passes = 3 * points + self.apart
        self.checking = False

    def points(self, state: State) -> Tensor:
        """(B · k, C, H, W) where gradients are taken, a row's points side by side."""
        at: Tensor = state["at"]
        return at

    def combine(self, state: State, gradient: Tensor) -> Tensor:
        """(B, C, H, W) the direction, from the gradients at `points`."""
        return gradient

    def ahead(self, state: State) -> Tensor:
        """Nesterov's lookahead x + α μ g (arXiv:1908.06281, eq. 6), cut to the box.

        The momentum g is summed from gradients of l1 length one, whose coordinates are tiny beside α. So it is
        scaled by the l1 length of a steepest direction: in linf the mean magnitude of each summand is then one, as
        in the authors' code; in every norm one summand reaches as far as one step.
        """
        at: Tensor = state["at"]
        if "momentum" not in state:
            return at
        velocity = state["momentum"]
        unit = self.setting.ball(state).steepest(velocity).flatten(1).abs().sum(1)
        reach = self._size(state) * self.schedule.decay * unit
        return (at + column(reach, at) * velocity).clamp_(*self.setting.bounds)

    def query(self, state: State) -> Query:
        """Gradients at the points, or the iterates' logits for a check."""
        if self.checking or self.ending(state):
            return Query(state["at"], "logits", loss=self.loss)
        return Query(self.points(state), "loss_grad", loss=self.loss)

    def step(self, state: State, answer: Answer) -> State:
        """One step of the rows that have steps left; a check only ends the others."""
        if answer.gradient is None:
            self.checking = False
            return {"t": state["t"] + (state["t"] >= self.schedule.steps)}
        self.checking = self.apart
        direction = self.combine(state, answer.gradient)
        if "mask" in state:
            direction = direction * state["mask"]
        return super().step(state, replace(answer, gradient=direction))


@dataclass(frozen=True, kw_only=True)
class TransferAttack(Walk):
    """The hyper-parameters that these methods share.

    Attributes:
        steps: gradient steps.
        step_size: in the unit of x; None for eps / steps.
        decay: the momentum's factor μ, at least 0.
        loss: a name of `robust.losses`.
    """

    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0
    loss: str = "cross-entropy"

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        if not self.decay >= 0:
            raise RobustError(f"decay={self.decay} must be at least 0")
        return Schedule(self.steps, 1.0 / max(self.steps, 1), self.step_size, decay=self.decay)

    def steps_of(self, trial: Trial) -> tuple[Setting, Schedule, Loss, bool]:
        """What a rule of steps is made of."""
        return setting_of(trial), self.schedule(), get_loss(self.loss), self.loss == "kl"

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """A gradient and a check per step."""
        return super().passes(**chosen) * 4 / 3
