"""What gradient walks share whose start, step or targets are their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.engine import make_jobs, run_rule
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.errors import RobustError


@dataclass(frozen=True, kw_only=True)
class Walk(Attack):
    """A method that walks along gradients by a rule of its own."""

    def schedule(self) -> Schedule:
        """How this method walks."""
        raise TypeError(f"{type(self).__name__} has no schedule")

    def rule(self, trial: Trial) -> GradientSteps:
        """The rule of its steps."""
        raise TypeError(f"{type(self).__name__} has no rule")

    def aims(self, trial: Trial) -> Tensor | None:
        """(T, N) classes that the loss is aimed at, or None for the trial's own target, if it has one."""
        return None

    def runs(self) -> int:
        """Starts per sample."""
        return 1

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        schedule = self.schedule()
        if min(schedule.steps, schedule.copies, self.runs()) < 1:
            raise RobustError(
                f"steps={schedule.steps}, copies={schedule.copies}, restarts={self.runs()}: each at least 1"
            )
        if schedule.step_size is not None and not schedule.step_size > 0:
            raise RobustError(f"step_size={schedule.step_size} must be positive")
        run_rule(self.rule(trial), trial, make_jobs(trial, self.runs(), self.aims(trial)))
