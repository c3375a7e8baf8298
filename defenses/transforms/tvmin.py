"""Total variation minimisation from randomly kept pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.defense import Defense

_PRIMAL, _DUAL = 1.0, 0.125  # step sizes; their product times 8, the operator's squared norm, is at most 1


@dataclass(frozen=True, kw_only=True)
class TVMin(Defense):
    """Total variation minimisation from randomly kept pixels (Guo et al. 2018, arXiv:1711.00117).

    The image z of each channel that minimises ½‖m · (z − x)‖² + weight · TV(z), where the mask m drops each pixel, in
    all channels, with the probability `drop`, and TV is the isotropic total variation (Rudin et al. 1992); x and
    `weight` are in units of the box's width. The paper's data term is not squared. Solved for all images at once by a
    fixed number of primal-dual steps (Chambolle & Pock 2011), from an image whose gaps are filled by the means of
    what was kept around them.

    Autograd through the solver sees its steps and no more; attacks take the identity's gradient, as Athalye et al.

    Attributes:
        drop: probability of a pixel to be dropped, in [0, 1); 0 denoises without randomness in effect.
        weight: of the total variation, positive.
        steps: of the solver.
    """

    name: ClassVar[str] = "tv-min"
    differentiable: ClassVar[bool] = False
    bpda: ClassVar[bool] = True
    randomised: ClassVar[bool] = True
    drop: float = 0.2
    weight: float = 0.01
    steps: int = 40

    def __post_init__(self) -> None:
        self.require(0 <= self.drop < 1, f"drop={self.drop} is outside [0, 1)")
        finite = math.isfinite(self.weight)
        self.require(finite and self.weight > 0, f"weight={self.weight} must be positive and finite")
        self.require(self.steps >= 1, f"steps={self.steps} solves nothing; give at least 1")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        low, high = bounds
        kept = self.draws(x, key).uniform(1, *x.shape[2:]) >= self.drop
        z = minimise((x - low) / (high - low), kept.to(x.dtype), self.weight, self.steps)
        return z * (high - low) + low


def minimise(x: Tensor, kept: Tensor, weight: float, steps: int) -> Tensor:
    """The minimiser of ½‖kept · (z − x)‖² + weight · TV(z), for each channel of x (N, C, H, W).

    Args:
        kept: (N, 1, H, W) of 0 and 1; x does not matter where it is 0.
        weight: positive; steps: of the primal-dual method (Chambolle & Pock 2011, algorithm 1).
    """
    z = ahead = _filled(x, kept)
    down, right = torch.zeros_like(x), torch.zeros_like(x)
    data, scale = _PRIMAL * kept * x, 1 + _PRIMAL * kept
    for _ in range(steps):
        down = down + _DUAL * F.pad(ahead[:, :, 1:] - ahead[:, :, :-1], (0, 0, 0, 1))
        right = right + _DUAL * F.pad(ahead[..., 1:] - ahead[..., :-1], (0, 1))
        # The small number keeps autograd through the solver finite where there is no slope.
        size = (down * down + right * right + 1e-12).sqrt().div(weight).clamp_min(1)
        down, right = down / size, right / size
        moved = z + _PRIMAL * _divergence(down, right)
        new = (moved + data) / scale
        ahead, z = 2 * new - z, new
    return z


def _divergence(down: Tensor, right: Tensor) -> Tensor:
    """The negative adjoint of forward differences, whose last row and column are zero."""
    return down - F.pad(down[:, :, :-1], (0, 0, 1, 0)) + right - F.pad(right[..., :-1], (1, 0))


def _filled(x: Tensor, kept: Tensor) -> Tensor:
    """Dropped values by the mean of those kept in the 3 × 3 around them, or else of the whole channel."""
    known = x * kept
    count = F.avg_pool2d(kept, 3, 1, 1)
    whole = known.mean((2, 3), keepdim=True) / kept.mean((2, 3), keepdim=True).clamp_min(1e-6)
    near = F.avg_pool2d(known, 3, 1, 1) / count.clamp_min(1e-6)
    return torch.where(kept > 0, x, torch.where(count > 0, near, whole))
