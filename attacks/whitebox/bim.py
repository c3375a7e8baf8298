"""Basic iterative method (Kurakin et al. 2017, arXiv:1607.02533)."""

from __future__ import annotations

from dataclasses import dataclass

from robust.attacks.whitebox.pgd import GradientAttack
from robust.attacks.whitebox.steps import Schedule


@dataclass(frozen=True, kw_only=True)
class BIM(GradientAttack):
    """Basic iterative method (Kurakin et al. 2017, arXiv:1607.02533): projected steps from the clean point.

    Attributes:
        steps: gradients.
        step_size: in the unit of x; None for eps / steps, the paper's smallest that can reach the ball's edge.
    """

    steps: int = 10
    step_size: float | None = None

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        return Schedule(self.steps, 1.0 / max(self.steps, 1), self.step_size)
