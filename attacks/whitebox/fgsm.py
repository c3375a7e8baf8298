"""Fast gradient methods: one step of the whole radius (Goodfellow et al. 2015, arXiv:1412.6572)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from robust.attacks.whitebox.pgd import GradientAttack
from robust.attacks.whitebox.steps import Schedule


@dataclass(frozen=True, kw_only=True)
class FGSM(GradientAttack):
    """Fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572): one step of eps along the sign, linf."""

    norms: ClassVar[tuple[str, ...]] = ("linf",)

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        return Schedule(steps=1, relative_step=1.0)


@dataclass(frozen=True, kw_only=True)
class FGM(FGSM):
    """Fast gradient method (Goodfellow et al. 2015, arXiv:1412.6572): FGSM's one step in the threat's own norm."""

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
