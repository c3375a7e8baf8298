"""Repeated additive noise, a baseline that every attack should beat (Rauber et al. 2017, arXiv:1707.04131)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from robust.attacks.blackbox.decision import DecisionAttack
from robust.attacks.blackbox.noises import NoiseRule
from robust.attacks.phases import Rows
from robust.attacks.rule import Setting
from robust.errors import UnknownName
from robust.rng import Draws

Noise = Literal["gaussian", "uniform"]


class AdditiveNoiseRule(NoiseRule):
    """Independent noise on every coordinate; the amount is its scale beside the box's width."""

    def __init__(self, setting: Setting, queries: int, noise: Noise) -> None:
        super().__init__(setting, queries)
        self.noise = noise

    def noisy(self, draws: Draws, x: Tensor, amounts: Tensor) -> Tensor:
        """See `NoiseRule.noisy`."""
        shape = (amounts.shape[1], *x.shape[1:])
        unit = draws.normal(*shape) if self.noise == "gaussian" else 2 * draws.uniform(*shape) - 1
        low, high = self.setting.bounds
        return x[:, None] + (high - low) * amounts[:, :, None, None, None] * unit.to(x)

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`; noise beyond a finite radius is taken to its edge: outside it would be in vain."""
        points, ball = super().propose(phase, rows), self.setting.threat
        if "eps" in rows:
            ball = ball.with_eps(rows["eps"].repeat_interleave(self.width))
        x = rows["x"].repeat_interleave(self.width, 0)
        return ball.project(points.flatten(0, 1), x, self.setting.bounds).view_as(points)


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(DecisionAttack):
    """Additive noise (Rauber et al. 2017, arXiv:1707.04131): Gaussian or uniform, of ever smaller scale, as in Foolbox.

    A baseline: noise knows nothing of the model, so it stays far from the smallest perturbation.

    Attributes:
        queries: the most noisy images per sample.
        noise: "gaussian", whose scale is the standard deviation, or "uniform", whose scale is the largest value.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    heuristic: ClassVar[bool] = True
    queries: int = 1000
    noise: Noise = "gaussian"

    def rule(self, setting: Setting) -> AdditiveNoiseRule:
        """See `DecisionAttack.rule`."""
        if self.noise not in ("gaussian", "uniform"):
            raise UnknownName(f"noise={self.noise!r} is unknown; use 'gaussian' or 'uniform'")
        return AdditiveNoiseRule(setting, self.queries, self.noise)
