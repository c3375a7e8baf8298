"""Fast FGSM: one step from a random point (Wong et al. 2020, arXiv:2001.03994)."""

from __future__ import annotations

from dataclasses import dataclass

from robust.attacks.whitebox.pgd import GradientAttack
from robust.attacks.whitebox.steps import Schedule


@dataclass(frozen=True, kw_only=True)
class FFGSM(GradientAttack):
    """Fast FGSM (Wong et al. 2020, arXiv:2001.03994): one step of 1.25 · eps from a uniformly random point of the ball.

    The paper's norm is linf; in l2 and l1 start and step are the threat's own.

    Attributes:
        step_size: in the unit of x; None for 1.25 · eps, the paper's 10/255 for 8/255.
    """

    step_size: float | None = None

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        return Schedule(1, 1.25, self.step_size, random_start=True)
