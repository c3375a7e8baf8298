"""The bumps of the l2 and l1 Square attack (Andriushchenko et al. 2020, arXiv:1912.00049, sec. 3.2)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def _half(height: int, width: int) -> Tensor:
    """η of eq. 2: rings of 1/(n + 1 − k)² summed from the outside in, highest at the middle."""
    middle_row, middle_col = height // 2, width // 2
    rows = (torch.arange(height) - middle_row).abs()[:, None]
    cols = (torch.arange(width) - middle_col).abs()[None]
    rings = max(height, width) // 2 + 1
    ring = torch.maximum(rows, cols)
    values = torch.zeros(height, width)
    for radius in range(rings):
        values += torch.where(ring <= radius, 1.0 / (radius + 1) ** 2, 0.0)
    return values


@lru_cache(maxsize=64)
def bump(side: int, power: int) -> Tensor:
    """(side, side): one half of the window up, the other down, of length one in l2 (power 2) or l1 (power 1)."""
    values = torch.empty(side, side)
    half = side // 2
    values[:half] = _half(half, side) if half else values[:half]
    values[half:] = -_half(side - half, side)
    return values / (values.abs().sum() if power == 1 else values.square().sum().sqrt())


@lru_cache(maxsize=8)
def bump_table(largest: int, power: int) -> Tensor:
    """(largest + 1, largest, largest): `bump` of every odd side, zero-padded."""
    table = torch.zeros(largest + 1, largest, largest)
    for side in range(1, largest + 1, 2):
        table[side, :side, :side] = bump(side, power)
    return table


@lru_cache(maxsize=8)
def grid_start(height: int, width: int, power: int) -> Tensor:
    """(25, H, W): bumps on a 5 × 5 grid of tiles that covers the image but for a remainder at its edges."""
    side = max(min(height, width) // 5, 1)
    tiles = torch.zeros(25, height, width)
    top, left = max((height - 5 * side) // 2, 0), max((width - 5 * side) // 2, 0)
    for k in range(25):
        row, col = top + side * (k // 5), left + side * (k % 5)
        if row + side <= height and col + side <= width:
            tiles[k, row : row + side, col : col + side] = bump(side, power)
    return tiles


def window_values(
    table: Tensor, side: Tensor, corner: tuple[Tensor, Tensor], turn: Tensor, size: torch.Size
) -> tuple[Tensor, Tensor]:
    """Bump values and masks (B, 1, H, W) of each row's window.

    Args:
        table: from `bump_table`; side: (B,); corner: top and left (B,).
        turn: (B,) random words; the top bit transposes the bump.
        size: H, W.
    """
    table = table.to(side.device)
    rows = torch.arange(size[0], device=side.device)[None] - corner[0][:, None]
    cols = torch.arange(size[1], device=side.device)[None] - corner[1][:, None]
    inside = ((rows >= 0) & (rows < side[:, None]))[:, :, None] & ((cols >= 0) & (cols < side[:, None]))[
        :, None
    ]
    limit = table.shape[1] - 1
    i = rows.clamp(0, limit)[:, :, None].expand(inside.shape)
    j = cols.clamp(0, limit)[:, None].expand(inside.shape)
    turned = (turn >> 31).bool()[:, None, None]
    values = table[side[:, None, None], torch.where(turned, j, i), torch.where(turned, i, j)]
    return (values * inside)[:, None], inside[:, None].float()
