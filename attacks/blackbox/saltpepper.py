"""Repeated salt-and-pepper noise, a baseline that every attack should beat (Rauber et al. 2017, arXiv:1707.04131)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robust.attacks.blackbox.decision import DecisionAttack
from robust.attacks.blackbox.noises import NoiseRule, salt_and_pepper
from robust.attacks.rule import Setting
from robust.rng import Draws


class SaltPepperRule(NoiseRule):
    """Black and white pixels; the amount is their share."""

    def noisy(self, draws: Draws, x: Tensor, amounts: Tensor) -> Tensor:
        """See `NoiseRule.noisy`."""
        return salt_and_pepper(draws, x, amounts, self.setting.bounds)


@dataclass(frozen=True, kw_only=True)
class SaltPepper(DecisionAttack):
    """Salt-and-pepper noise (Rauber et al. 2017, arXiv:1707.04131): ever fewer black and white pixels, as in Foolbox.

    A baseline: noise knows nothing of the model, so it stays far from the smallest perturbation.

    Attributes:
        queries: the most noisy images per sample.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0", "l1", "l2")
    heuristic: ClassVar[bool] = True
    queries: int = 1000

    def rule(self, setting: Setting) -> SaltPepperRule:
        """See `DecisionAttack.rule`."""
        return SaltPepperRule(setting, self.queries)
