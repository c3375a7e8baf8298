"""Projected gradient descent (Madry et al. 2018, arXiv:1706.06083; l1 after Tramèr & Boneh 2019, arXiv:1904.13000)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robust.attacks.base import Attack
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.errors import RobustError
from robust.losses import get as get_loss


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
    """What the methods that walk along gradients have in common.

    Attributes:
        loss: a name of `robust.losses`.
    """

    loss: str = "cross-entropy"

    def schedule(self) -> Schedule:
        """How this method walks."""
        raise TypeError(f"{type(self).__name__} has no schedule")

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        schedule = self.schedule()
        if schedule.steps < 1 or schedule.copies < 1:
            raise RobustError(f"steps={schedule.steps}, copies={schedule.copies}: each at least 1")
        if schedule.step_size is not None and not schedule.step_size > 0:
            raise RobustError(f"step_size={schedule.step_size} must be positive")
        rule = GradientSteps(setting_of(trial), schedule, get_loss(self.loss), self.loss == "kl")
        run_rule(rule, trial, make_jobs(trial, self.runs()))

    def runs(self) -> int:
        """Starts per sample."""
        return 1


@dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
    """Projected gradient descent from random starts (Madry et al. 2018, arXiv:1706.06083).

    In l1 a step is spread over the steepest 5 % of the coordinates (Tramèr & Boneh 2019, arXiv:1904.13000).

    Attributes:
        steps: gradients per start.
        step_size: in the unit of x; None for 2.5 · eps / steps.
        restarts: starts, each random.
        random_start: False starts from the clean point (then restarts repeat it).
        copies: forwards each gradient is averaged over (EOT), for randomised models.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0", "patch")
    steps: int = 20
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    copies: int = 1

    def schedule(self) -> Schedule:
        """See `GradientAttack.schedule`."""
        return Schedule(
            self.steps, 2.5 / max(self.steps, 1), self.step_size, self.random_start, copies=self.copies
        )

    def runs(self) -> int:
        """See `GradientAttack.runs`."""
        if self.restarts < 1:
            raise RobustError(f"restarts={self.restarts} is no search; give at least 1")
        return self.restarts
