"""The iterative least-likely class method (Kurakin et al. 2017, arXiv:1607.02533)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from robust.attacks.engine import setting_of
from robust.attacks.targets import ranked_targets
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.walks import Walk
from robust.losses import cross_entropy


@dataclass(frozen=True, kw_only=True)
class LLC(Walk):
    """Iterative least-likely class (Kurakin et al. 2017, arXiv:1607.02533): steps towards the unlikeliest class.

    That class is the wrong one with the smallest clean logit, unless targets are given. Without them any
    misclassification is a success, though the loss only pulls towards the one class.

    Attributes:
        steps: gradients.
        step_size: in the unit of x; None for eps / steps, the paper's smallest that can reach the ball's edge.
    """

    steps: int = 10
    step_size: float | None = None

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        return Schedule(self.steps, 1.0 / max(self.steps, 1), self.step_size)

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        return GradientSteps(setting_of(trial), self.schedule(), cross_entropy)

    def aims(self, trial: Trial) -> Tensor | None:
        """The least likely class of every sample, or the one target that was asked for."""
        return None if trial.targets is not None else ranked_targets(trial, trial.classes)[-1:]
