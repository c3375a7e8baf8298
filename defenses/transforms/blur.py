"""Smoothing by a separable kernel: a local mean, or a Gaussian."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.cuda_ops import separable_blur
from robust.defense import Defense
from robust.errors import DataError


def _blur(name: str, x: Tensor, taps: list[float]) -> Tensor:
    if len(taps) // 2 >= min(x.shape[2:]):
        height, width = x.shape[2:]
        raise DataError(f"{name}: {len(taps)} taps reach beyond images of {height}×{width}; choose fewer")
    kernel = torch.tensor(taps, dtype=torch.float32, device=x.device)
    return separable_blur(x, kernel, kernel)


@dataclass(frozen=True, kw_only=True)
class MeanSmooth(Defense):
    """Local mean (Li & Li 2017, arXiv:1612.07767): each pixel is the average of the square around it.

    Linear, so that its gradient is exact. Edges are reflected.

    Attributes:
        size: side of the square in pixels, at least 2; an even one reaches one pixel further up and to the left.
    """

    name: ClassVar[str] = "mean-smooth"
    size: int = 3

    def __post_init__(self) -> None:
        self.require(self.size >= 2, f"size={self.size} smooths nothing; give at least 2")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        even = [0.0] * (1 - self.size % 2)
        return _blur(self.name, x, [1 / self.size] * self.size + even)


@dataclass(frozen=True, kw_only=True)
class GaussianSmooth(Defense):
    """Gaussian blur (Gu & Rigazio 2015, arXiv:1412.5068).

    Linear, so that its gradient is exact. The kernel is cut off after three deviations; edges are reflected.

    Attributes:
        sigma: the kernel's standard deviation in pixels, positive.
    """

    name: ClassVar[str] = "gaussian-smooth"
    sigma: float = 0.6

    def __post_init__(self) -> None:
        finite = math.isfinite(self.sigma)
        self.require(finite and self.sigma > 0, f"sigma={self.sigma} must be positive and finite, in pixels")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        reach = max(1, math.ceil(3 * self.sigma))
        taps = [math.exp(-0.5 * (i / self.sigma) ** 2) for i in range(-reach, reach + 1)]
        return _blur(self.name, x, [tap / math.fsum(taps) for tap in taps])
