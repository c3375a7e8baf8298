"""σ-zero: the fewest changed pixels by descent on a smooth count of them (Cinà et al. 2024, arXiv:2402.01879)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, column
from robust.attacks.trial import Trial
from robust.classifier import misclassified
from robust.errors import DataError, RobustError
from robust.losses import get as get_loss

_LAST = 0.1  # share of the step size that the cosine schedule ends at


@dataclass(frozen=True)
class Descent:
    """σ-zero's hyper-parameters; see `SigmaZero`."""

    steps: int
    sigma: float
    step_size: float
    threshold: float
    threshold_step: float


class SigmaZeroRule(Rule):
    """Algorithm 1 of the paper, with the count, and what the threshold cuts, per pixel.

    All lengths are shares of the box's width. Per step: the gradient of the margin, where it is not won yet, plus that
    of Σ_p s_p / (s_p + σ) over the number of pixels, s_p the squared length of pixel p's change; normalised in linf; a
    step; the cut to the box; and pixels whose largest change is below τ return to the clean ones. τ rises while the
    point is adversarial and falls while it is not.
    """

    feasible = False
    steady = True

    def __init__(self, setting: Setting, descent: Descent) -> None:
        super().__init__(setting)
        self.descent, self.loss = descent, get_loss("margin")
        self.steps = descent.steps + 1
        self.width = setting.bounds[1] - setting.bounds[0]

    def start(self, state: State) -> State:
        """The clean point."""
        x, own = state["x"], super().start(state)
        own["at"] = x.clone()
        own["threshold"] = torch.full((len(x),), self.descent.threshold, device=x.device)
        return own

    def query(self, state: State) -> Query:
        """Gradients, except where every row only checks its last point."""
        return Query(state["at"], "logits" if self.ending(state) else "loss_grad", loss=self.loss)

    def step(self, state: State, answer: Answer) -> State:
        """One step on loss and count, and the cut of small changes."""
        t, x = state["t"], state["x"]
        if answer.gradient is None:
            return {"t": t + 1}
        won = misclassified(answer.scores, state["y"], state.get("target"))
        delta = (state["at"] - x) / self.width
        downhill = column(~won, x) * answer.gradient * self.width - self._count_gradient(delta)
        peak = downhill.flatten(1).abs().amax(1).clamp_min(1e-12)
        share = t / self.descent.steps
        size = self.descent.step_size * (_LAST + (1 - _LAST) * (1 + torch.cos(math.pi * share)) / 2)
        moved = x + self.width * (delta + column(size / peak, x) * downhill)
        moved = moved.clamp(*self.setting.bounds)
        sign = torch.where(won, 1.0, -1.0)
        threshold = (state["threshold"] + sign * self.descent.threshold_step * size).clamp(0, 1)
        largest = ((moved - x) / self.width).abs().amax(1, keepdim=True)
        moved = torch.where(largest < column(threshold, x), x, moved)
        return {"at": moved, "threshold": threshold, "t": t + 1}

    def _count_gradient(self, delta: Tensor) -> Tensor:
        """The gradient of the smooth count of changed pixels, over their number."""
        squares = delta.square().sum(1, keepdim=True)
        pixels = squares[0].numel()
        return 2 * delta * self.descent.sigma / (squares + self.descent.sigma).square() / pixels


@dataclass(frozen=True, kw_only=True)
class SigmaZero(Attack):
    """σ-zero (Cinà et al. 2024, arXiv:2402.01879): descent on a differentiable l0, the fewest changed pixels.

    The paper counts coordinates; here l0 counts pixels changed in any channel, so the differentiable count and the
    threshold take a pixel's channels together. Defaults are the paper's.

    Attributes:
        steps: gradients.
        sigma: how sharp the differentiable count is, in squared box widths; small is sharp.
        step_size: of the first step, in box widths; a cosine takes it to a tenth.
        threshold: τ, the change below which a pixel is reset, at the start; in [0, 1] box widths.
        threshold_step: how fast τ follows success, as a share of the step size.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    minimum_norm: ClassVar[bool] = True
    until: Until = "smallest"
    steps: int = 1000
    sigma: float = 1e-3
    step_size: float = 1.0
    threshold: float = 0.3
    threshold_step: float = 0.01

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or not self.sigma > 0 or not self.step_size > 0:
            raise RobustError(
                f"steps={self.steps}, sigma={self.sigma}, step_size={self.step_size}: at least 1, and positive"
            )
        if not 0 <= self.threshold <= 1 or not self.threshold_step >= 0:
            raise RobustError(
                f"threshold={self.threshold}, threshold_step={self.threshold_step}: in [0, 1], and not negative"
            )
        if trial.x.dim() != 4:
            raise DataError(f"sigma-zero needs images (N, C, H, W); x is {tuple(trial.x.shape)}")
        descent = Descent(self.steps, self.sigma, self.step_size, self.threshold, self.threshold_step)
        run_rule(SigmaZeroRule(setting_of(trial), descent), trial, make_jobs(trial))
