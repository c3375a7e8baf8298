"""Nesterov's lookahead and scaled copies of the image (Lin et al. 2020, arXiv:1908.06281)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust.attacks.rule import Setting, State
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.transfer import TransferAttack, TransferSteps, black
from robust.errors import RobustError
from robust.losses import Loss


class ScaledLookahead(TransferSteps):
    """The mean gradient of J(S_i(x + α μ g)), i < m, where S_i divides the distance from black by 2^i."""

    def __init__(
        self, setting: Setting, schedule: Schedule, loss: Loss, reference: bool, scales: int = 1
    ) -> None:
        super().__init__(setting, schedule, loss, reference, scales)
        self.scales = scales

    def _factors(self, x: Tensor) -> Tensor:
        """(1, m, 1, …) the powers 2^-i."""
        powers = torch.arange(self.scales, dtype=x.dtype, device=x.device)
        return torch.exp2(-powers).view(1, -1, *[1] * (x.dim() - 1))

    def points(self, state: State) -> Tensor:
        """The lookahead and its darker copies."""
        ahead, dark = self.ahead(state), black(self.setting.bounds)
        copies = (ahead - dark)[:, None] * self._factors(ahead) + dark
        return copies.flatten(0, 1)

    def combine(self, state: State, gradient: Tensor) -> Tensor:
        """The mean over the copies, each with the factor that its scale brings (∇ₓ J(S_i(x)))."""
        copies = gradient.view(-1, self.scales, *gradient.shape[1:])
        return (copies * self._factors(gradient)).mean(1)


@dataclass(frozen=True, kw_only=True)
class NIFGSM(TransferAttack):
    """NI-FGSM (Lin et al. 2020, arXiv:1908.06281): momentum steps along the gradient at Nesterov's lookahead.

    The lookahead is as long as in the authors' code, whose momentum sums gradients over their mean magnitude; taken
    by the letter of the paper, over their l1 norm, it would be too short to matter. It is cut to the box.

    Attributes:
        steps: gradient steps.
        step_size: in the unit of x; None for eps / steps.
        decay: the momentum's factor μ, at least 0.
        loss: a name of `robust.losses`.
    """

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        return ScaledLookahead(*self.steps_of(trial))


@dataclass(frozen=True, kw_only=True)
class SINIFGSM(TransferAttack):
    """SI-NI-FGSM (Lin et al. 2020, arXiv:1908.06281): NI-FGSM's gradient averaged over copies of the image x / 2^i.

    Attributes:
        steps: gradient steps.
        step_size: in the unit of x; None for eps / steps.
        decay: the momentum's factor μ, at least 0.
        scales: the copies m, from i = 0; one gradient each, at least 1.
        loss: a name of `robust.losses`.
    """

    scales: int = 5

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        if self.scales < 1:
            raise RobustError(f"scales={self.scales} leaves no image; give at least 1")
        return ScaledLookahead(*self.steps_of(trial), self.scales)

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """A gradient per copy and a check, per step."""
        scales: int = chosen.get("scales", cls.scales)
        return super().passes(**chosen) * (3 * scales + 1) / 4
