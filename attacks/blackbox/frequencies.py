"""Smooth random images: noise in the low frequencies of the discrete cosine transform."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from robust.rng import Draws

_ALWAYS = 10  # frequencies per axis that are kept in any case, where the image has them


def cosines(side: int, share: float) -> Tensor:
    """(side, k) float64: orthonormal cosines of an axis, the lowest `share` of its frequencies, at least ten."""
    count = min(side, max(math.ceil(share * side), _ALWAYS))
    place, frequency = torch.arange(side).double() + 0.5, torch.arange(count).double()
    waves = (math.pi / side * place[:, None] * frequency).cos() * math.sqrt(2 / side)
    waves[:, 0] /= math.sqrt(2)
    return waves


def smooth_noise(draws: Draws, count: int, x: Tensor, share: float) -> Tensor:
    """(B, count, C, H, W) images beside x (B, C, H, W) whose low-frequency coefficients are standard normal."""
    rows, columns = (cosines(side, share).to(x.device) for side in x.shape[2:])
    numbers = draws.normal(count, x.shape[1], rows.shape[1], columns.shape[1]).double()
    return (rows @ numbers @ columns.T).to(x)  # products in float64, so that no batch changes the float32
