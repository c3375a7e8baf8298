"""Bit-depth reduction."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robust.defense import Defense


@dataclass(frozen=True, kw_only=True)
class BitDepth(Defense):
    """Bit-depth reduction (Xu et al. 2018, arXiv:1704.01155): each value rounded to one of 2^bits levels of the box.

    Rounding has no gradient; attacks take the identity's (straight through).

    Attributes:
        bits: of each channel's value, 1 to 8.
    """

    name: ClassVar[str] = "bit-depth"
    differentiable: ClassVar[bool] = False
    bpda: ClassVar[bool] = True
    bits: int = 3

    def __post_init__(self) -> None:
        self.require(1 <= self.bits <= 8, f"bits={self.bits} is outside 1 to 8")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        low, high = bounds
        step: float = (high - low) / (2**self.bits - 1)
        levels = ((x.clamp(low, high) - low) / step).round()
        return (levels * step + low).clamp(low, high)
