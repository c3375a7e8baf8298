"""A patch as a printable PNG: as many dots as its physical size takes, with the resolution stored in the file."""

from __future__ import annotations

import io
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.digest import write_atomic
from robust.errors import RobustError

_MOST_DOTS = 20_000  # of a side: a poster of 1.7 m at 300 dpi
MM_PER_INCH = 25.4


def print_patch(
    texture: Tensor, mask: Tensor, path: Path, width_mm: float, dpi: float, *, smooth: bool = True
) -> tuple[int, int]:
    """Writes the PNG and returns its height and width in dots.

    Args:
        texture: (1 or 3, h, w) in [0, 1]; mask: (h, w) in [0, 1], what is left out stays white.
        width_mm: physical width; the dots' number is the nearest whole one. dpi: dots per inch.
    """
    from PIL import Image

    if texture.shape[0] not in (1, 3):
        raise RobustError(f"a patch of {texture.shape[0]} channels cannot be printed; one or three can")
    if not (width_mm > 0 and dpi > 0):
        raise RobustError(f"width_mm={width_mm:g}, dpi={dpi:g}: a print has a positive width and resolution")
    dots = dots_of(texture.shape[1] / texture.shape[2] * width_mm, dpi), dots_of(width_mm, dpi)
    if max(dots) > _MOST_DOTS or min(dots) < 1:
        raise RobustError(
            f"{width_mm:g} mm at {dpi:g} dpi are {dots[1]} dots across; choose between 1 and {_MOST_DOTS}"
        )
    ink = enlarged(texture, dots, smooth)
    cover = enlarged(mask[None].to(texture), dots, smooth) >= 0.5
    levels = (torch.where(cover, ink, 1.0).clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = levels.permute(1, 2, 0).cpu().numpy()
    stream = io.BytesIO()
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    picture.save(stream, format="PNG", dpi=(dpi, dpi), optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, stream.getvalue())
    return dots


def dots_of(millimetres: float, dpi: float) -> int:
    """The whole number of dots nearest to a length."""
    return round(millimetres / MM_PER_INCH * dpi)


def enlarged(image: Tensor, size: tuple[int, int], smooth: bool) -> Tensor:
    """(C, h, w) at another size, interpolated, or each pixel as a block."""
    if smooth:
        return F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
    return F.interpolate(image[None], size, mode="nearest-exact")[0]
