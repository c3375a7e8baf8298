"""Translation-invariant gradients (Dong et al. 2019, arXiv:1904.02884)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.rule import Setting, State
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.transfer import TransferAttack, TransferSteps
from robust.cuda_ops import separable_blur
from robust.errors import RobustError
from robust.losses import Loss

Kernel = Literal["gaussian", "linear", "uniform"]


def line(kind: Kernel, size: int, sigmas: float) -> Tensor:
    """(size,) weights of a kernel along one axis, of sum one."""
    radius = size // 2
    at = torch.arange(-radius, radius + 1, dtype=torch.float32) / max(radius, 1)
    weights = {
        "gaussian": torch.exp(-((sigmas * at) ** 2) / 2),
        "linear": 1 - at.abs() * radius / (radius + 1),
        "uniform": torch.ones_like(at),
    }[kind]
    return weights / weights.sum()


class SmoothedSteps(TransferSteps):
    """Steps along W ∗ ∇J(x): the gradient's mean over translations of the image, to first order (sec. 3.2)."""

    feasible = steady = True
    apart = False

    def __init__(
        self, setting: Setting, schedule: Schedule, loss: Loss, reference: bool, weights: Tensor
    ) -> None:
        super().__init__(setting, schedule, loss, reference)
        self.weights = weights

    def combine(self, state: State, gradient: Tensor) -> Tensor:
        """Each channel smoothed, with zeros beyond the edges."""
        reach = len(self.weights) // 2
        weights = self.weights.to(gradient)
        padded = F.pad(gradient, (reach,) * 4)
        height, width = gradient.shape[2:]
        return separable_blur(padded, weights, weights)[
            :, :, reach : reach + height, reach : reach + width
        ].contiguous()


@dataclass(frozen=True, kw_only=True)
class TIFGSM(TransferAttack):
    """TI-FGSM (Dong et al. 2019, arXiv:1904.02884): MI-FGSM along gradients that are smoothed by a kernel.

    The defaults are those of the paper's TI-MI-FGSM on images of 299 pixels; smaller images want a smaller kernel.
    A smoothed direction gives up what fine detail would gain on the model itself: targets are seldom reached.

    Attributes:
        steps: gradient steps.
        step_size: in the unit of x; None for eps / steps.
        decay: the momentum's factor μ, at least 0.
        kernel: "gaussian", "linear" or "uniform".
        kernel_size: its side 2k + 1 in pixels, odd.
        sigmas: standard deviations of the Gaussian from its middle to its edge, positive: 3 in the authors' code,
            √3 in the paper's text (σ = k/√3).
        loss: a name of `robust.losses`.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    heuristic: ClassVar[bool] = True
    kernel: Kernel = "gaussian"
    kernel_size: int = 15
    sigmas: float = 3.0

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        if self.kernel not in ("gaussian", "linear", "uniform"):
            raise RobustError(f"kernel={self.kernel!r} is unknown; use 'gaussian', 'linear' or 'uniform'")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0 or not self.sigmas > 0:
            raise RobustError(
                f"kernel_size={self.kernel_size}, sigmas={self.sigmas}: an odd number, and positive"
            )
        return SmoothedSteps(*self.steps_of(trial), line(self.kernel, self.kernel_size, self.sigmas))

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """A gradient per step."""
        return super().passes(**chosen) * 3 / 4
