"""stAdv: images that a smooth flow of their pixels turns adversarial (Xiao et al. 2018, arXiv:1801.02612)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, column
from robust.attacks.trial import Trial
from robust.attacks.warp import pixel_grid, sample
from robust.errors import DataError, RobustError
from robust.losses import get as get_loss

_DECAYS = (0.9, 0.999)  # of Adam's two means
_SMALL = 1e-8  # below the root of a squared difference, which has no slope at 0


class FlowRule(Rule):
    """The paper's objective: Adam on the flow, down max(−margin, −κ) + τ · roughness.

    The model's gradient at the flowed image is pulled back to the flow through the bilinear sampling.
    """

    steady = True

    def __init__(
        self, setting: Setting, steps: int, step_size: float, smoothness: float, confidence: float
    ) -> None:
        super().__init__(setting)
        self.moves, self.steps = steps, steps + 1
        self.step_size, self.smoothness, self.confidence = step_size, smoothness, confidence
        self.loss = get_loss("margin")

    def start(self, state: State) -> State:
        """No flow."""
        x, own = state["x"], super().start(state)
        own["flow"] = x.new_zeros(len(x), 2, *x.shape[2:])
        own["mean"], own["square"] = torch.zeros_like(own["flow"]), torch.zeros_like(own["flow"])
        return own

    def query(self, state: State) -> Query:
        """Gradients at the flowed images, except where every row only checks its last one."""
        x, bounds = state["x"], self.setting.bounds
        image = self.setting.ball(state).project(flowed(x, state["flow"]), x, bounds)
        return Query(image, "logits" if self.ending(state) else "loss_grad", loss=self.loss)

    def step(self, state: State, answer: Answer) -> State:
        """One step of Adam."""
        turns = state["t"] + 1
        if answer.gradient is None:
            return {"t": turns}
        assert answer.loss is not None
        uphill = answer.gradient * column(answer.loss < self.confidence, answer.gradient)
        slope = self._slope(state, uphill)
        first, second = _DECAYS
        mean = (
            first * state["mean"] + (1 - first) * slope
        )  # not lerp, whose bits depend on the place in memory
        square = second * state["square"] + (1 - second) * slope.square()
        unbiased = mean / column(1 - first ** turns.float(), mean)
        scale = (square / column(1 - second ** turns.float(), mean)).sqrt()
        flow = state["flow"] - self.step_size * unbiased / (scale + _SMALL)
        return {"t": turns, "flow": flow, "mean": mean, "square": square}

    def _slope(self, state: State, uphill: Tensor) -> Tensor:
        """The objective's gradient in the flow, from the margin's in the image."""
        with torch.enable_grad():
            flow = state["flow"].detach().requires_grad_(True)
            image = flowed(state["x"], flow)
            objective = self.smoothness * roughness(flow).sum() - (image * uphill).sum()
            (slope,) = torch.autograd.grad(objective, flow)
        return slope


def flowed(x: Tensor, flow: Tensor) -> Tensor:
    """Images whose pixels are read where the flow (B, 2, H, W) points, in pixels down and across; edges repeat."""
    down, across = pixel_grid(x.shape[2], x.shape[3], x)
    return sample(x, down + flow[:, 0], across + flow[:, 1], None)


def roughness(flow: Tensor) -> Tensor:
    """(B,) sum over pixels and their four neighbours of the length of the difference of their flows."""
    pairs = (flow[:, :, 1:] - flow[:, :, :-1], flow[:, :, :, 1:] - flow[:, :, :, :-1])
    lengths = [(pair.square().sum(1) + _SMALL).sqrt().flatten(1).sum(1) for pair in pairs]
    return 2 * (lengths[0] + lengths[1])


@dataclass(frozen=True, kw_only=True)
class StAdv(Attack):
    """stAdv (Xiao et al. 2018, arXiv:1801.02612): a smooth flow moves the pixels of an image, none is changed.

    Departures: Adam instead of L-BFGS; τ is a tenth of the paper's 0.05, which leaves images of models with small
    logits where they are; without a target the margin leads away from the true class. It is meant for a
    threat of the whole box; under a smaller radius the flowed image is cut to the ball. until="broken" keeps the first
    success, whose flow is smooth; "strongest" the largest margin on the way.

    Attributes:
        steps: gradients.
        step_size: Adam's, in pixels.
        smoothness: τ, weight of the flow's roughness against the margin, at least 0.
        confidence: κ, the margin at which only the roughness is left to lower, at least 0.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    semantic: ClassVar[bool] = True
    heuristic: ClassVar[bool] = True  # what flows reach within a small radius depends on the image
    steps: int = 100
    step_size: float = 0.02
    smoothness: float = 0.005
    confidence: float = 0.0

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or not self.step_size > 0:
            raise RobustError(f"steps={self.steps}, step_size={self.step_size}: at least 1, and positive")
        if not self.smoothness >= 0 or not self.confidence >= 0:
            raise RobustError(
                f"smoothness={self.smoothness}, confidence={self.confidence}: neither may be negative"
            )
        if trial.x.dim() != 4:
            raise DataError(f"stadv needs images (N, C, H, W); x is {tuple(trial.x.shape)}")
        rule = FlowRule(setting_of(trial), self.steps, self.step_size, self.smoothness, self.confidence)
        run_rule(rule, trial, make_jobs(trial))
