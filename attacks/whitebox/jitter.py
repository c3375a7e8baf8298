"""Jitter: a loss on scaled and noisy scores (Schwinn et al. 2021, arXiv:2105.10304)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from robust.attacks.engine import setting_of
from robust.attacks.query import Answer
from robust.attacks.rule import Setting, State, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.walks import Walk
from robust.classifier import misclassified
from robust.errors import RobustError
from robust.losses import Loss


@lru_cache
def jitter_loss(scale: float) -> Loss:
    """‖ẑ − Y + n‖₂ with ẑ = softmax(scale · z / ‖z‖∞), the label's one-hot Y and noise n; negative towards a target.

    The noise stands in the place of `reference`. It acts on the gradient alone: the value is that without noise, by
    which points are compared. One object per scale, since compiled programs are kept by their loss.
    """

    def loss(
        logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
    ) -> Tensor:
        size = logits.abs().amax(1, keepdim=True).clamp_min(1e-12)
        aim = y if targets is None else targets
        wanted = torch.zeros_like(logits).scatter(1, aim[:, None], 1.0)
        gap = (scale * logits / size).softmax(1) - wanted
        value: Tensor = torch.linalg.vector_norm(gap, dim=1)
        if reference is not None:
            noisy: Tensor = torch.linalg.vector_norm(gap + reference, dim=1)
            value = value.detach() + (noisy - noisy.detach())
        return value if targets is None else -value

    return loss


class JitterSteps(GradientSteps):
    """Steps along the gradient of the loss, over ‖x' − x‖₂ where x' is misclassified: a success shrinks.

    The division is by the Euclidean norm in every threat, as in the authors' experiments in linf. Towards a target the
    loss is lowered and has no such quotient.
    """

    def __init__(self, setting: Setting, schedule: Schedule, loss: Loss, sigma: float) -> None:
        super().__init__(setting, schedule, loss)
        self.sigma = sigma

    def start(self, state: State) -> State:
        """A keyed random point, and the first noise."""
        own = super().start(state)
        return {**own, "reference": self._noise(state, own["t"])}

    def _noise(self, state: State, step: Tensor) -> Tensor:
        """(B, K) noise of a step."""
        return self.sigma * self.setting.draws(state, "jitter", step).normal(self.setting.classes)

    def step(self, state: State, answer: Answer) -> State:
        """One projected step, and the next noise."""
        changed: State = {"reference": self._noise(state, state["t"] + 1)}
        if answer.gradient is not None and not self.setting.targeted:
            answer = Answer(answer.scores, answer.loss, self._quotient(state, answer, answer.gradient))
        return {**super().step(state, answer), **changed}

    def _quotient(self, state: State, answer: Answer, gradient: Tensor) -> Tensor:
        """Gradient of loss / ‖x' − x‖ where x' is misclassified, times ‖x' − x‖, which no step's direction sees."""
        assert answer.loss is not None
        delta = state["at"] - state["x"]
        square = delta.flatten(1).square().sum(1)
        hit = misclassified(answer.scores, state["y"], None) & (square > 0)
        pull = torch.where(hit, answer.loss / square.clamp_min(1e-30), 0.0)
        return gradient - column(pull, delta) * delta


@dataclass(frozen=True, kw_only=True)
class Jitter(Walk):
    """Jitter (Schwinn et al. 2021, arXiv:2105.10304): PGD on the distance of scaled, noisy scores to the one-hot label.

    Attributes:
        steps: gradients per start.
        step_size: in the unit of x; None for 2.5 · eps / steps.
        restarts: starts, each random.
        scale: the paper's α: what the largest |logit| is scaled to before the softmax.
        sigma: standard deviation of the noise; the authors choose it per model among 0.05, 0.1, …, 0.25.
    """

    steps: int = 100
    step_size: float | None = None
    restarts: int = 1
    scale: float = 10.0
    sigma: float = 0.1

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        return Schedule(self.steps, 2.5 / max(self.steps, 1), self.step_size, random_start=True)

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        if not self.scale > 0 or not self.sigma >= 0:
            raise RobustError(
                f"scale={self.scale}, sigma={self.sigma}: give a positive scale and no negative sigma"
            )
        return JitterSteps(setting_of(trial), self.schedule(), jitter_loss(self.scale), self.sigma)

    def runs(self) -> int:
        """See `Walk.runs`."""
        return self.restarts
