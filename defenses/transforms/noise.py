"""Gaussian noise at every forward."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.cuda_ops import noise_batch
from robust.defense import Defense

_WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class GaussianNoise(Defense):
    """Additive Gaussian noise, drawn anew for every answer (Gu & Rigazio 2015, arXiv:1412.5068).

    Noisy values may leave the box, as in randomised smoothing; no clipping hides a gradient.

    Attributes:
        sigma: standard deviation as a fraction of the box's width, positive: 0.03 is about 8/255 of [0, 1].
    """

    name: ClassVar[str] = "gaussian-noise"
    randomised: ClassVar[bool] = True
    sigma: float = 0.03

    def __post_init__(self) -> None:
        finite = math.isfinite(self.sigma)
        self.require(finite and self.sigma > 0, f"sigma={self.sigma} must be positive and finite")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        identity = torch.arange(len(x), device=x.device)
        sigma = self.sigma * (bounds[1] - bounds[0])
        return noise_batch(x, sigma, identity, 0, (key & _WORD, (key >> 32) & _WORD))
