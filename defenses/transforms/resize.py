"""Random sizes and places: an image resized and padded, or a crop of it enlarged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.cuda_ops import resize_pad
from robust.defense import Defense
from robust.errors import DataError
from robust.rng import Draws


def _side(name: str, x: Tensor) -> int:
    height, width = x.shape[2:]
    if height != width:
        raise DataError(f"{name} takes square images, and these are {height}×{width}")
    return height


@dataclass(frozen=True, kw_only=True)
class ResizePad(Defense):
    """Random resizing and padding (Xie et al. 2018, arXiv:1711.01991).

    Each image gets a size between two fractions of its own, uniformly, and a uniform place on a canvas of the larger
    one; what is left of the canvas is the box's lowest value (black). Square images only. The paper enlarges (299 to at
    most 331, that is 1 to 1.1); a model whose input size is fixed takes no larger canvas than its images.

    Attributes:
        smallest, largest: the range of sizes, and the canvas, as fractions of the image's side.
    """

    name: ClassVar[str] = "resize-pad"
    randomised: ClassVar[bool] = True
    smallest: float = 0.9
    largest: float = 1.0

    def __post_init__(self) -> None:
        holds = 0 < self.smallest <= self.largest <= 8
        self.require(
            holds,
            f"smallest={self.smallest}, largest={self.largest}: 0 < smallest <= largest <= 8 is wanted",
        )

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        side = _side(self.name, x)
        least, canvas = (max(1, round(share * side)) for share in (self.smallest, self.largest))
        # Sizes are drawn on the host, as they decide which calls there are.
        draws = Draws(key, self.name, torch.arange(len(x)))
        sizes = least + draws.below(canvas - least + 1, 1)[:, 0]
        places = draws.branch("place").below((canvas - sizes + 1)[:, None], 2)
        parts, order = [], []
        for size in sizes.unique().tolist():
            rows = (sizes == size).nonzero()[:, 0]
            top, left = places[rows].to(x.device).unbind(1)
            parts.append(resize_pad(x[rows.to(x.device)], size, top, left, canvas, canvas, bounds[0]))
            order.append(rows)
        return torch.cat(parts)[torch.cat(order).argsort().to(x.device)]


@dataclass(frozen=True, kw_only=True)
class RandomCrop(Defense):
    """Random crop, enlarged to the image's size (Guo et al. 2018, arXiv:1711.00117).

    Each image gets a uniform place for a square crop. Square images only. The paper averages 30 crops' answers; here
    an outcome is the majority over the draws, as for every randomised model.

    Attributes:
        share: the crop's side as a fraction of the image's, below 1; the paper's is 90 of 224, 0.4.
    """

    name: ClassVar[str] = "random-crop"
    randomised: ClassVar[bool] = True
    share: float = 0.9

    def __post_init__(self) -> None:
        self.require(0 < self.share < 1, f"share={self.share} is outside (0, 1)")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        side = _side(self.name, x)
        # A window of the enlarged image: what leaves the canvas is cut off.
        enlarged = max(side + 1, round(side / self.share))
        places = self.draws(x, key).below(enlarged - side + 1, 2)
        return resize_pad(x, enlarged, -places[:, 0], -places[:, 1], side, side, bounds[0])
