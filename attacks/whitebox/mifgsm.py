"""Momentum iterative FGSM (Dong et al. 2018, arXiv:1710.06081)."""

from __future__ import annotations

from dataclasses import dataclass

from robust.attacks.whitebox.pgd import GradientAttack
from robust.attacks.whitebox.steps import Schedule


@dataclass(frozen=True, kw_only=True)
class MIFGSM(GradientAttack):
    """Momentum iterative FGSM (Dong et al. 2018, arXiv:1710.06081): steps along accumulated normalised gradients.

    Attributes:
        steps: gradients.
        step_size: in the unit of x; None for eps / steps.
        decay: the momentum's factor μ.
    """

    steps: int = 10
    step_size: float | None = None
    decay: float = 1.0

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        return Schedule(self.steps, 1.0 / max(self.steps, 1), self.step_size, decay=self.decay)
