"""Projected gradient descent (Madry et al. 2018, arXiv:1706.06083; l1 after Tramèr & Boneh 2019, arXiv:1904.13000)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robust.attacks.engine import setting_of
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.walks import Walk
from robust.errors import RobustError
from robust.losses import get as get_loss


@dataclass(frozen=True, kw_only=True)
class GradientAttack(Walk):
    """What the methods that walk along gradients of a loss have in common.

    Attributes:
        loss: a name of `robust.losses`.
    """

    loss: str = "cross-entropy"

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        return GradientSteps(setting_of(trial), self.schedule(), get_loss(self.loss), self.loss == "kl")


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
        """See `Walk.schedule`."""
        return Schedule(
            self.steps, 2.5 / max(self.steps, 1), self.step_size, self.random_start, copies=self.copies
        )

    def runs(self) -> int:
        """See `Walk.runs`."""
        if self.restarts < 1:
            raise RobustError(f"restarts={self.restarts} is no search; give at least 1")
        return self.restarts
