"""FMN: fast minimum-norm attacks in l0, l1, l2 and linf (Pintor et al. 2021, arXiv:2102.12827)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.rule import Setting, State, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.minimum import MinimumAttack, MinimumRule, corner, cosine
from robust.errors import RobustError
from robust.losses import get as get_loss
from robust.threat import L2

_TINY = 1e-12


class FMNRule(MinimumRule):
    """Algorithm 1 of the paper, on the logit margin.

    Per step: the radius ε shrinks by γ where the iterate is adversarial, to at most the best distance. Else it grows
    by γ, or, before the boundary was crossed once, reaches to the linearised boundary: the iterate's distance plus
    |margin| over the gradient's dual norm, and γ beyond it: exactly there, as in the paper, the boundary of a linear
    model is never crossed. Then a step of length α along the gradient's l2 direction, and the projection on the ball of
    radius ε in the box. In l0 the radius is a whole number of pixels that starts at one and
    changes by at least one.
    """

    def __init__(
        self, setting: Setting, steps: int, sizes: tuple[float, float], gammas: tuple[float, float]
    ) -> None:
        super().__init__(setting, steps, get_loss("margin"))
        self.sizes, self.gammas = sizes, gammas
        self.counts = setting.threat.norm == "l0"

    def start(self, state: State) -> State:
        """See `MinimumRule.start`."""
        own = super().start(state)
        ones = torch.ones(len(state["x"]), device=state["x"].device)
        own["radius"], own["nearest"] = ones, ones * torch.inf
        return own

    def move(self, state: State, hit: Tensor, loss: Tensor, gradient: Tensor) -> State:
        """See `MinimumRule.move`."""
        x, at, t, threat = state["x"], state["at"], state["t"], self.setting.threat
        away = threat.distance(at, x).to(x.dtype)
        nearest = torch.where(hit, away.minimum(state["nearest"]), state["nearest"])
        gamma = cosine(*self.gammas, t, self.gradients)
        if self.counts:
            radius = self._count(state["radius"], hit, nearest, gamma)
        else:
            radius = self._radius(state["radius"], hit, nearest, gamma, away, loss, threat.dual(gradient))
        radius = radius.minimum(threat.distance(corner(x, self.setting.bounds), x).to(x.dtype))
        size = cosine(*self.sizes, t, self.gradients)
        moved = at + column(size, x) * L2().steepest(gradient)
        ball = threat.with_eps(radius.clamp_min(_TINY))
        moved = ball.project(moved, x, self.setting.bounds)
        return {"at": moved, "radius": radius, "nearest": nearest}

    def _radius(
        self,
        radius: Tensor,
        hit: Tensor,
        nearest: Tensor,
        gamma: Tensor,
        away: Tensor,
        loss: Tensor,
        dual: Tensor,
    ) -> Tensor:
        """(B,) the next radius, in the unit of x."""
        reach = away + loss.abs() / dual.clamp_min(_TINY)
        grown = torch.where(nearest.isinf(), reach, radius) * (1 + gamma)
        return torch.where(hit, (radius * (1 - gamma)).minimum(nearest), grown)

    def _count(self, radius: Tensor, hit: Tensor, nearest: Tensor, gamma: Tensor) -> Tensor:
        """(B,) the next radius in pixels."""
        fewer = (radius - 1).minimum((radius * (1 - gamma)).floor()).minimum(nearest)
        more = (radius + 1).maximum((radius * (1 + gamma)).floor())
        return torch.where(hit, fewer.clamp_min(1), more)


@dataclass(frozen=True, kw_only=True)
class FMN(MinimumAttack):
    """FMN (Pintor et al. 2021, arXiv:2102.12827): fast minimum-norm perturbations in l0, l1, l2 and linf.

    The paper counts coordinates in l0; here l0 counts pixels changed in any channel, and so do radius and projection.
    Projections are on ball ∩ box at once, where the paper cuts to the box afterwards. The schedules end at 1e-3, which
    measured best here in all norms together.

    Attributes:
        steps: gradients.
        step_size: α_0, l2 length of the first step, in the unit of x.
        last_size: α_K, of the last step; a cosine leads there.
        gamma: γ_0, by which share the radius shrinks or grows at first, in (0, 1).
        last_gamma: γ_K, at the end; in (0, 1).
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    step_size: float = 1.0
    last_size: float = 1e-3
    gamma: float = 0.05
    last_gamma: float = 1e-3

    def rule(self, trial: Trial, setting: Setting) -> FMNRule:
        """See `MinimumAttack.rule`."""
        if not self.step_size > 0 or not self.last_size > 0:
            raise RobustError(
                f"step_size={self.step_size}, last_size={self.last_size}: both must be positive"
            )
        if not 0 < self.gamma < 1 or not 0 < self.last_gamma < 1:
            raise RobustError(f"gamma={self.gamma}, last_gamma={self.last_gamma}: both must be in (0, 1)")
        sizes, gammas = (self.step_size, self.last_size), (self.gamma, self.last_gamma)
        return FMNRule(setting, self.steps, sizes, gammas)
