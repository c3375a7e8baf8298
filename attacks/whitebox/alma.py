"""ALMA: minimum norms by an augmented Lagrangian of the constraint (Rony et al. 2021, arXiv:2011.11857)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.rule import Setting, State, choose, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.minimum import MinimumAttack, MinimumRule
from robust.errors import RobustError
from robust.losses import Loss
from robust.losses import get as get_loss

_EVERY = 10  # M, steps between two looks at the penalty's weight
_IMPROVED = 0.95  # τ: the share of the constraint at the last look that counts as progress
_HEAVIER = 1.2  # γ, by which the weight grows where there was none
_MULTIPLIERS = (1e-6, 1e12)
_NEAR = 0.2  # of the distance to the boundary: the first step in l1
_SPARSE = 0.3  # of the steepest coordinate: what takes part in the first step in l1
_LAST = 0.01  # share of the first step size that the decay ends at


def slope(value: Tensor, weight: Tensor, multiplier: Tensor) -> Tensor:
    """P′(value; ρ, μ) of the penalty P2, which is twice differentiable at 0.

    P = μ v + μ ρ v² + ρ² v³ / 6 where v ≥ 0, and μ v / (1 − ρ v) below, with ρ at least 1 there.
    """
    inside = value.clamp_max(0)
    outside = value.clamp_min(0)
    below = multiplier / (1 - weight.clamp_min(1) * inside).square()
    above = multiplier + 2 * multiplier * weight * outside + weight.square() * outside.square() / 2
    return torch.where(value >= 0, above, below)


class ALMARule(MinimumRule):
    """The paper's algorithm: one gradient step on ‖δ‖ + P(v; ρ, μ) for each update of the multiplier.

    v is negative where the point is adversarial. μ is a moving average of P′(v); until the first adversarial point ρ
    grows every ten steps, unless v has become clearly smaller. Steps are RMSProp with momentum, the first so long that
    it goes `reach` far; they shrink exponentially from the first adversarial point on.
    """

    def __init__(
        self, setting: Setting, steps: int, loss: Loss, reach: float | None, smoothing: float
    ) -> None:
        super().__init__(setting, steps, loss)
        self.reach, self.smoothing, self.sparse = reach, smoothing, setting.threat.norm == "l1"

    def start(self, state: State) -> State:
        """See `MinimumRule.start`."""
        x, own = state["x"], super().start(state)
        ones = torch.ones(len(x), device=x.device)
        own |= {"weight": ones, "multiplier": ones.clone(), "looked": ones * torch.inf, "size": ones.clone()}
        own["crossed"], own["found"] = torch.zeros_like(state["hit"]), own["t"] + self.gradients
        own["squares"], own["speed"] = torch.ones_like(x), torch.zeros_like(x)
        return own

    def move(self, state: State, hit: Tensor, loss: Tensor, gradient: Tensor) -> State:
        """See `MinimumRule.move`."""
        x, at, t, begins = state["x"], state["at"], state["t"], state["t"] == 0
        crossed = state["crossed"] | hit
        found = torch.where(hit & ~state["crossed"], t, state["found"])
        changed = self._penalty(self._begun(state, gradient), crossed, -loss)
        rise = slope(-loss, changed["weight"], changed["multiplier"])
        penalty = -column(rise, x) * gradient
        descent = choose(begins, self._first(penalty), self._descent(at - x, penalty))
        size = torch.where(begins, self._first_size(descent, loss, gradient), state["size"])
        passed = (t - found).clamp_min(0) / (self.gradients - found).clamp_min(1)
        squares = self.smoothing * state["squares"] + (1 - self.smoothing) * descent.square()
        speed = self.smoothing * state["speed"] + descent / (squares.sqrt() + 1e-8)
        moved = at - column(size * _LAST**passed, x) * speed
        if self.sparse:  # a coordinate that would pass through 0 stops there
            moved = torch.where((moved - x) * (at - x) < 0, x, moved)
        moved = moved.clamp(*self.setting.bounds)
        changed |= {"at": moved, "crossed": crossed, "found": found}
        return changed | {"size": size, "squares": squares, "speed": speed}

    def _penalty(self, state: State, crossed: Tensor, value: Tensor) -> State:
        """Weight ρ and multiplier μ after a look at the constraint's `value`."""
        t, multiplier = state["t"], state["multiplier"]
        look = (t + 1) % _EVERY == 0
        stuck = look & ~crossed & (value >= _IMPROVED * state["looked"])
        weight = torch.where(stuck, state["weight"] * _HEAVIER, state["weight"])
        mean = self.smoothing * multiplier + (1 - self.smoothing) * slope(value, weight, multiplier)
        return {
            "weight": weight,
            "multiplier": torch.where(t > 0, mean.clamp(*_MULTIPLIERS), multiplier),
            "looked": torch.where(look | (t == 0), value, state["looked"]),
        }

    def _begun(self, state: State, gradient: Tensor) -> State:
        """The state with the first multiplier at t = 0: at least 1, and twice what ‖δ‖ pulls back with."""
        least = 2 / self.setting.threat.dual(gradient).clamp_min(1e-12)
        first = least.clamp(1, _MULTIPLIERS[1])
        return {**state, "multiplier": torch.where(state["t"] == 0, first, state["multiplier"])}

    def _first_size(self, descent: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        """(B,) the size that takes the first step `reach` far; in l1 once RMSProp has levelled its coordinates."""
        reach = loss.abs() / self.setting.threat.dual(gradient).clamp_min(1e-12)
        reach = reach * (_NEAR if self.sparse else 1.0)
        reach = reach if self.reach is None else torch.full_like(reach, self.reach)
        length = self.setting.threat.length(descent).to(reach.dtype)
        if self.sparse:
            length = length / descent.flatten(1).abs().amax(1).clamp_min(1e-12)
        return reach / length.clamp_min(1e-12)

    def _first(self, penalty: Tensor) -> Tensor:
        """The first descent, without ‖δ‖; in l1 along the steepest coordinates, as its perturbations are sparse."""
        if not self.sparse:
            return penalty
        floor = column(penalty.flatten(1).abs().amax(1) * _SPARSE, penalty)
        return (penalty.abs() - floor).clamp_min(0) * penalty.sign()

    def _descent(self, delta: Tensor, penalty: Tensor) -> Tensor:
        """The gradient of ‖δ‖ plus that of the penalty; in l1 the smallest subgradient, which rests at 0."""
        if not self.sparse:
            return self.setting.threat.steepest(delta) + penalty
        resting = (penalty.abs() - 1).clamp_min(0) * penalty.sign()
        return torch.where(delta == 0, resting, delta.sign() + penalty)


@dataclass(frozen=True, kw_only=True)
class ALMA(MinimumAttack):
    """ALMA (Rony et al. 2021, arXiv:2011.11857): an augmented Lagrangian on the logits' order, smallest l1 or l2.

    In l1 the paper takes the sign as the norm's gradient, and iterates stay dense. Here it is the smallest subgradient,
    coordinates that would pass through 0 stop there, and the first step takes the steepest ones only. The multiplier
    starts at 1 as in the paper, or higher where the norm's pull would else keep the iterate at the clean point.
    The constraint is on the difference of logits ratio; with a target on the margin, whose ratio mostly got stuck.

    Attributes:
        steps: gradients; the paper takes 100 and 1,000.
        reach: how far the first step goes, in the unit of x; None for the distance to the boundary by the clean
            point's gradient, a fifth of it in l1 (the paper has a number per data set).
        smoothing: α of the multiplier's average, of RMSProp and of its momentum, in [0, 1); the authors' code has 0.9,
            with 1,000 steps.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2", "l1")
    reach: float | None = None
    smoothing: float = 0.7

    def rule(self, trial: Trial, setting: Setting) -> ALMARule:
        """See `MinimumAttack.rule`."""
        if self.reach is not None and not self.reach > 0:
            raise RobustError(f"reach={self.reach} must be positive")
        if not 0 <= self.smoothing < 1:
            raise RobustError(f"smoothing={self.smoothing} must be in [0, 1)")
        loss = get_loss("dlr" if trial.classes >= 3 and trial.targets is None else "margin")
        return ALMARule(setting, self.steps, loss, self.reach, self.smoothing)
