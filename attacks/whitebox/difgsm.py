"""Diverse inputs (Xie et al. 2019, arXiv:1803.06978)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.rule import Setting, State
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.transfer import TransferAttack, TransferSteps, black
from robust.cuda_ops import resize_pad
from robust.errors import RobustError
from robust.losses import Loss


class DiverseSteps(TransferSteps):
    """Steps along ∇ₓ J(T(x; p)): with probability p the image is resized and padded, anew for each row and step."""

    def __init__(
        self,
        setting: Setting,
        schedule: Schedule,
        loss: Loss,
        reference: bool,
        smallest: float,
        probability: float,
    ) -> None:
        super().__init__(setting, schedule, loss, reference)
        self.smallest, self.probability = smallest, probability

    def points(self, state: State) -> Tensor:
        """The iterates, transformed."""
        return self._transform(state["at"], state)

    def combine(self, state: State, gradient: Tensor) -> Tensor:
        """The gradient at T(x) through T, which is linear."""
        leaf = torch.zeros_like(gradient, requires_grad=True)
        with torch.enable_grad():
            moved = self._transform(leaf, state)
        (pulled,) = torch.autograd.grad(moved, leaf, gradient)
        return pulled

    def _transform(self, images: Tensor, state: State) -> Tensor:
        """T of each row; rows of one size are resized together."""
        height, width = images.shape[2:]
        full = min(height, width)
        least = min(max(int(self.smallest * full), 1), full - 1)
        if least < 1:
            return images
        chance, *among = self.setting.draws(state, "diverse", state["t"]).uniform(4).unbind(1)
        size = least + (among[0] * (full - least)).long()
        top, left = (among[1] * (height - size + 1)).long(), (among[2] * (width - size + 1)).long()
        size, fill = torch.where(chance < self.probability, size, 0), black(self.setting.bounds)
        parts, order = [], []
        for edge in size.unique().tolist():
            rows = (size == edge).nonzero()[:, 0]
            part, place = images[rows], (top[rows], left[rows])
            parts.append(resize_pad(part, edge, *place, height, width, fill) if edge else part)
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort()]


@dataclass(frozen=True, kw_only=True)
class DIFGSM(TransferAttack):
    """DI²-FGSM (Xie et al. 2019, arXiv:1803.06978): iterative FGSM with inputs resized and padded at random.

    The paper resizes images of 299 to at most 330 pixels and pads them to 330, for models that take any size; here
    the canvas keeps its size, so the image becomes as much smaller. It is resized to a square. With decay=1 this is
    the paper's M-DI²-FGSM.

    Attributes:
        steps: gradient steps.
        step_size: in the unit of x; None for eps / steps.
        decay: the momentum's factor μ, at least 0.
        resize_rate: smallest size as a fraction of the shorter side, in (0, 1).
        diversity: the probability p of a transformation, in [0, 1].
        loss: a name of `robust.losses`.
    """

    decay: float = 0.0
    resize_rate: float = 0.9
    diversity: float = 0.5

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        if not 0 < self.resize_rate < 1 or not 0 <= self.diversity <= 1:
            raise RobustError(
                f"resize_rate={self.resize_rate}, diversity={self.diversity}: in (0, 1), and in [0, 1]"
            )
        return DiverseSteps(*self.steps_of(trial), self.resize_rate, self.diversity)
