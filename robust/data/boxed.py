"""Images in a model's own box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from robust.data.base import Images

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BoxedImages:
    """Images of [0, 1] scaled to a model's box."""

    images: Images
    low: float
    high: float

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return self.images.shape

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images of the given rows in the box."""
        scaled = self.low + (self.high - self.low) * self.images.read(rows)
        return scaled.clamp(self.low, self.high)

    def select(self, rows: Sequence[int]) -> BoxedImages:
        """The images of the given rows only."""
        return replace(self, images=self.images.select(rows))

    def probe(self) -> None:
        """See `robust.data.base.Images.probe`."""
        self.images.probe()
