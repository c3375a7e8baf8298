"""Where a patch lies in an image, and the picture it gives there: batched, keyed, differentiable in the texture."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.errors import RobustError
from robust.rng import Draws
from robust.threat import Patch

Shape = Literal["rectangle", "round"]
_FINER = 4  # points along each side of a pixel, whose mean says how far the patch covers it


@dataclass(frozen=True)
class Placements:
    """One place per image.

    Attributes:
        angle: (N,) degrees, clockwise. scale: (N,) against the patch's own size.
        down, across: (N,) row and column of its centre, in pixels.
    """

    angle: Tensor
    scale: Tensor
    down: Tensor
    across: Tensor

    def __len__(self) -> int:
        return len(self.angle)


@dataclass(frozen=True)
class Ranges:
    """What placements are drawn from: angles in ± `rotation` degrees, scales in [`smallest`, `largest`]."""

    rotation: float = 20.0
    smallest: float = 0.8
    largest: float = 1.2

    def __post_init__(self) -> None:
        if not (0 <= self.rotation <= 180 and 0 < self.smallest <= self.largest):
            raise RobustError(
                f"rotation={self.rotation}, scale {self.smallest} to {self.largest}: in [0, 180], positive, ascending"
            )

    def draw(self, draws: Draws, image: tuple[int, int], patch: tuple[float, float]) -> Placements:
        """Keyed placements, one per row of `draws`: uniform in angle, scale and place, wholly inside the image.

        Args:
            image, patch: height and width in pixels. A patch too large for the image lies in its middle.
        """
        turn, size, *place = draws.uniform(4).unbind(1)
        angle = (2 * turn - 1) * self.rotation
        scale = self.smallest + (self.largest - self.smallest) * size
        return inside(torch.stack(place, 1), angle, scale, image, patch)


def inside(
    place: Tensor, angle: Tensor, scale: Tensor, image: tuple[int, int], patch: tuple[float, float]
) -> Placements:
    """Placements at shares `place` (N, 2) in [0, 1] of the room that the turned and scaled patch leaves."""
    half = extents(angle, scale, patch) / 2
    sides = torch.tensor(image, dtype=place.dtype, device=place.device)
    room = (sides - 2 * half).clamp_min(0)
    centre = torch.where(room > 0, half - 0.5 + place * room, (sides - 1) / 2)
    return Placements(angle, scale, centre[:, 0], centre[:, 1])


def upright(
    draws: Draws, image: tuple[int, int], patch: tuple[int, int], size: tuple[float, float] | None = None
) -> Placements:
    """Keyed placements on whole pixels, not turned: the patch as its threat, sides `patch`, allows it.

    A patch of another `size` than the threat's sides is scaled until it fits them.
    """
    place = draws.uniform(2)
    room = torch.tensor([max(a - b, 0) + 1 for a, b in zip(image, patch, strict=True)]).to(place)
    corner = (place * room).floor()
    centre = corner + (torch.tensor(patch).to(place) - 1) / 2
    scale = 1.0 if size is None else min(a / b for a, b in zip(patch, size, strict=True))
    flat = torch.zeros_like(place[:, 0])
    return Placements(flat, torch.full_like(flat, scale), centre[:, 0], centre[:, 1])


def extents(angle: Tensor, scale: Tensor, patch: tuple[float, float]) -> Tensor:
    """(N, 2) height and width, in pixels, of the upright rectangle around a turned and scaled patch."""
    radians = angle * (math.pi / 180)
    sine, cosine = radians.sin().abs(), radians.cos().abs()
    height, width = patch
    return scale[:, None] * torch.stack([height * cosine + width * sine, height * sine + width * cosine], 1)


def placed(
    x: Tensor, texture: Tensor, mask: Tensor, placements: Placements, size: tuple[float, float] | None = None
) -> Tensor:
    """Images with the patch in them, its picture sampled bilinearly; differentiable in the texture.

    A pixel at the edge is covered by the share of it that the patch lies on, as a camera would see it.

    Args:
        x: (N, C, H, W) images.
        texture: (C, a, b), or (N, C, a, b) with one for each image: the patch's picture, at any resolution.
        mask: (h, w) in [0, 1]: how far the patch covers what is behind it, at any resolution.
        size: the patch's height and width in pixels at scale 1; the mask's own h and w if None.
    """
    texture = texture.expand(len(x), *texture.shape[-3:])
    patch = (mask.shape[0], mask.shape[1]) if size is None else size
    colour = F.grid_sample(texture, _grid(x, placements, patch), padding_mode="border", align_corners=False)
    whole = mask.to(x).expand(len(x), 1, *mask.shape)
    parts = F.grid_sample(
        whole, _grid(x, placements, patch, _FINER), mode="nearest", padding_mode="zeros", align_corners=False
    )
    cover = F.avg_pool2d(parts, _FINER)
    return x * (1 - cover) + colour * cover


def _grid(x: Tensor, placements: Placements, patch: tuple[float, float], finer: int = 1) -> Tensor:
    """(N, H, W, 2) where each pixel of the images lies on the patch, in grid_sample's coordinates (across, down).

    With `finer` of them, (N, finer · H, finer · W, 2): points evenly over each pixel.
    """
    radians = placements.angle.to(x) * (math.pi / 180)
    sine, cosine = (value[:, None, None] for value in (radians.sin(), radians.cos()))
    scale, middle_down, middle_across = (
        value.to(x)[:, None, None] for value in (placements.scale, placements.down, placements.across)
    )
    rows, columns = (
        (torch.arange(finer * side, device=x.device, dtype=x.dtype) + 0.5) / finer - 0.5
        for side in x.shape[2:]
    )
    away_down, away_across = rows[None, :, None] - middle_down, columns[None, None] - middle_across
    height, width = patch
    down = (cosine * away_down - sine * away_across) / (scale * height / 2)
    across = (cosine * away_across + sine * away_down) / (scale * width / 2)
    return torch.stack(torch.broadcast_tensors(across, down), dim=-1)


def shape_mask(shape: str, height: int, width: int) -> Tensor:
    """(height, width) float32: 1 on the patch, else 0; "round" is the ellipse that touches the sides."""
    if shape == "rectangle":
        return torch.ones(height, width)
    if shape != "round":
        raise RobustError(f"shape={shape!r} is unknown; use 'rectangle' or 'round', or give a mask")
    down = (torch.arange(height) - (height - 1) / 2) / (height / 2)
    across = (torch.arange(width) - (width - 1) / 2) / (width / 2)
    return (down[:, None].square() + across[None].square() <= 1).float()


def full_size(
    share: float, mask: Tensor, sides: tuple[int, int], image: tuple[int, int]
) -> tuple[float, float]:
    """Height and width in pixels, in the ratio of `sides`, with which `mask` covers `share` of an image's area.

    At most as large as the image: then it covers less.
    """
    if not 0 < share <= 1:
        raise RobustError(f"share={share:g}: a patch covers a share of the area in (0, 1], such as 0.1")
    height, width = sides
    factor = math.sqrt(share * image[0] * image[1] / (float(mask.mean()) * height * width))
    factor = min(factor, image[0] / height, image[1] / width)
    return height * factor, width * factor


def patch_threat(share: float, height: int, width: int, shape: str = "rectangle") -> Patch:
    """The largest square patch, or disc, on whole pixels that covers at most `share` of an image's area.

    Args:
        share: of the image's area, in (0, 1].
        height, width: the image's, in pixels.
    """
    if not 0 < share <= 1:
        raise RobustError(f"a patch of {share:g} of the area is none; give a share in (0, 1], such as 0.1")
    most = share * height * width
    side = 1
    while side < min(height, width) and float(shape_mask(shape, side + 1, side + 1).sum()) <= most:
        side += 1
    return Patch(height=side, width=side)
