"""Images sampled at moved places, for attacks that move pixels instead of changing them."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_grid(height: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(H, W) rows and columns of every pixel, in `like`'s dtype and on its device."""
    down = torch.arange(height, dtype=like.dtype, device=like.device)
    across = torch.arange(width, dtype=like.dtype, device=like.device)
    return down[:, None].expand(height, width), across[None].expand(height, width)


def sample(x: Tensor, down: Tensor, across: Tensor, outside: float | None) -> Tensor:
    """Images sampled bilinearly, differentiable in the places; a whole number gives the pixel's own value, bit for bit.

    Args:
        x: (B, C, H, W); down, across: (B, H, W) rows and columns to read at, in pixels, any real numbers.
        outside: what lies outside an image; None repeats its edge.
    """
    height, width = x.shape[2:]
    if outside is None:
        down, across = held(down, 0, height - 1), held(across, 0, width - 1)
    top, left = down.detach().floor(), across.detach().floor()
    total = torch.zeros_like(x)
    for row, down_share in ((top, 1 - (down - top)), (top + 1, down - top)):
        for column, across_share in ((left, 1 - (across - left)), (left + 1, across - left)):
            value = _pixels(x, row, column)
            if outside is not None:
                within = (row >= 0) & (row < height) & (column >= 0) & (column < width)
                value = torch.where(within[:, None], value, outside)
            total = total + (down_share * across_share)[:, None] * value
    return total


def held(values: Tensor, low: float, high: float) -> Tensor:
    """Values cut to [low, high]; those at an edge keep their gradient, which torch's own clamp takes from them.

    What an optimiser has brought to an edge, or starts there, could otherwise never leave it.
    """
    cut = values.detach().clamp(low, high)
    return torch.where(cut == values, values, cut)


def _pixels(x: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """(B, C, H, W) the pixels at whole-numbered places (B, H, W), the nearest ones of the image."""
    height, width = x.shape[2:]
    place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
    found = x.flatten(2).gather(2, place.flatten(1)[:, None].expand(-1, x.shape[1], -1))
    return found.view(len(x), x.shape[1], *row.shape[1:])
