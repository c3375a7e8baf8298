"""Median smoothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from robust.defense import Defense
from robust.errors import DataError


@dataclass(frozen=True, kw_only=True)
class MedianSmooth(Defense):
    """Local median (Xu et al. 2018, arXiv:1704.01155): each pixel is the median of the square around it.

    Almost everywhere the output is one of the inputs, to which the gradient goes: autograd's is exact there. Of an even
    number of pixels the lower of the two in the middle is taken. Edges are reflected.

    Attributes:
        size: side of the square in pixels, at least 2; an even one reaches one pixel further down and to the right.
    """

    name: ClassVar[str] = "median-smooth"
    size: int = 3

    def __post_init__(self) -> None:
        self.require(self.size >= 2, f"size={self.size} smooths nothing; give at least 2")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        rows, channels, height, width = x.shape
        if self.size // 2 >= min(height, width):
            raise DataError(
                f"{self.name}: size={self.size} reaches beyond images of {height}×{width}; choose less"
            )
        before, after = (self.size - 1) // 2, self.size // 2
        padded = F.pad(x, (before, after, before, after), mode="reflect")
        windows = padded.unfold(2, self.size, 1).unfold(3, self.size, 1)
        return windows.reshape(rows, channels, height, width, -1).median(dim=-1).values
