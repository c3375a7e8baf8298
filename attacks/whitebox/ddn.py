"""DDN: the direction and the norm of the perturbation are searched apart (Rony et al. 2019, arXiv:1811.09600)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.rule import Setting, State, choose, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.minimum import MinimumAttack, MinimumRule, corner, cosine
from robust.errors import RobustError
from robust.losses import Loss
from robust.losses import get as get_loss

_LAST = 0.01  # share of the first step size that the cosine schedule ends at


class DDNRule(MinimumRule):
    """Algorithm 1 of the paper.

    Per step: along the normalised gradient of the loss, then back to the sphere of radius ε, which shrinks by
    γ where the iterate was adversarial and grows by γ where it was not; then the cut to the box.
    """

    def __init__(
        self, setting: Setting, steps: int, loss: Loss, sizes: tuple[float, float, float], levels: int | None
    ) -> None:
        super().__init__(setting, steps, loss)
        self.gamma, self.first, self.size = sizes
        self.levels = levels

    def start(self, state: State) -> State:
        """See `MinimumRule.start`."""
        own = super().start(state)
        own["radius"] = self.setting.eps(state).flatten().clamp_max(self.first)
        return own

    def move(self, state: State, hit: Tensor, loss: Tensor, gradient: Tensor) -> State:
        """See `MinimumRule.move`."""
        x, t, threat = state["x"], state["t"], self.setting.threat
        most = threat.length(corner(x, self.setting.bounds) - x).to(x.dtype)
        radius = state["radius"] * torch.where(hit, 1 - self.gamma, 1 + self.gamma)
        radius = radius.minimum(most)
        size = cosine(self.size, self.size * _LAST, t, self.gradients)
        ahead = state["at"] - x + column(size, x) * threat.steepest(self._lively(state, gradient))
        moved = x + column(radius, x) * threat.steepest(ahead)
        return {"at": self._quantised(moved.clamp(*self.setting.bounds)), "radius": radius}

    def _lively(self, state: State, gradient: Tensor) -> Tensor:
        """Keyed random directions in place of gradients that vanish, as in the paper."""
        dead = (gradient == 0).flatten(1).all(1)
        if not bool(dead.any()):
            return gradient
        noise = self.setting.draws(state, "ddn", state["t"]).normal(*gradient.shape[1:]).to(gradient)
        return choose(dead, noise, gradient)

    def _quantised(self, points: Tensor) -> Tensor:
        """The nearest of the box's equidistant levels, where there are such."""
        if self.levels is None:
            return points
        low, high = self.setting.bounds
        unit = (high - low) / (self.levels - 1)
        return (((points - low) / unit).round() * unit + low).clamp(low, high)


@dataclass(frozen=True, kw_only=True)
class DDN(MinimumAttack):
    """DDN (Rony et al. 2019, arXiv:1811.09600): decoupled direction and norm, the smallest l2 perturbation.

    The step size falls along a cosine to a hundredth. The paper quantises to 256 levels, which is off here.
    A heuristic in this sense: the cross-entropy leads away from all likely classes at once, so that even on a linear
    model with several classes near the boundary it ends up to a quarter beyond the optimum; loss="margin" does not.

    Attributes:
        steps: gradients; the paper has 100, 300 and 1,000.
        loss: a name of `robust.losses`; the paper's is the cross-entropy.
        gamma: by which share the norm shrinks or grows, in (0, 1).
        initial: the first norm, in the unit of x, where the threat's radius is not smaller.
        step_size: of the first step, in the unit of x.
        levels: values per coordinate that iterates are rounded to (256 for images of 8 bits); None for no rounding.
    """

    heuristic: ClassVar[bool] = True
    loss: str = "cross-entropy"
    gamma: float = 0.05
    initial: float = 1.0
    step_size: float = 1.0
    levels: int | None = None

    def rule(self, trial: Trial, setting: Setting) -> DDNRule:
        """See `MinimumAttack.rule`."""
        if not 0 < self.gamma < 1:
            raise RobustError(f"gamma={self.gamma} must be in (0, 1)")
        if not self.initial > 0 or not self.step_size > 0:
            raise RobustError(f"initial={self.initial}, step_size={self.step_size}: both must be positive")
        if self.levels is not None and self.levels < 2:
            raise RobustError(f"levels={self.levels} leaves no choice; give at least 2, or None")
        sizes = (self.gamma, self.initial, self.step_size)
        return DDNRule(setting, self.steps, get_loss(self.loss), sizes, self.levels)
