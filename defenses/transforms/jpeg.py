"""JPEG compression, batched on any device; baseline JPEG as libjpeg does it (ITU-T T.81, JFIF)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.defense import Defense

Round = Callable[[Tensor], Tensor]
# T.81, annex K.1: luminance and chrominance, row by row.
_LUMA = (
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17),
    *(22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78),
    *(87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA = (
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66),
    *(99, 99, 99, 99, 99, 99, *[99] * 32),
)
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168735892, -0.331264108, 0.5), (0.5, -0.418687589, -0.081312411))
_TO_RGB = ((1.0, 0.0, 1.402), (1.0, -0.344136286, -0.714136286), (1.0, 1.772, 0.0))
_TIE = 1e-6  # ties, which whole numbers make often, must fall alike whatever the order of sums


@dataclass(frozen=True, kw_only=True)
class JPEG(Defense):
    """JPEG compression and decompression (Dziugaite et al. 2016, arXiv:1608.00853; Guo et al. 2018, arXiv:1711.00117).

    Three channels are taken for RGB, with chroma halved in both directions (4:2:0); of any other number each is a grey
    image. What comes out is what a decoder shows, to a level or two of 255 (libjpeg computes in integers).

    Rounding has no gradient. Attacks take the one of the same steps without rounding (straight through), which knows
    what halving the chroma loses.

    Attributes:
        quality: libjpeg's scale, 1 to 100.
    """

    name: ClassVar[str] = "jpeg"
    differentiable: ClassVar[bool] = False
    bpda: ClassVar[bool] = True
    quality: int = 75

    def __post_init__(self) -> None:
        self.require(1 <= self.quality <= 100, f"quality={self.quality} is outside 1 to 100")

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """See `Defense.transform`."""
        low, high = bounds
        levels = (x.clamp(low, high).double() - low) * (255 / (high - low))
        return self._coded(levels, _round).to(x.dtype) * ((high - low) / 255) + low

    def substitute(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """The same without rounding and clipping: linear in x."""
        low, high = bounds
        levels = (x - low) * (255 / (high - low))
        return self._coded(levels, _exact) * ((high - low) / 255) + low

    def _coded(self, levels: Tensor, rounded: Round) -> Tensor:
        """Levels (N, C, H, W) in [0, 255] after coding and decoding."""
        height, width = levels.shape[2:]
        levels = _limited(rounded(levels), rounded)
        if levels.shape[1] != 3:
            return self._planes(levels, _LUMA, rounded)
        ycc = rounded(_mixed(levels, _TO_YCC, (0.0, 128.0, 128.0)))
        luma = self._planes(ycc[:, :1], _LUMA, rounded)
        chroma = self._planes(_halved(ycc[:, 1:], rounded), _CHROMA, rounded)
        wide = _doubled(chroma, rounded)[:, :, :height, :width]
        whole = torch.cat([luma, wide - 128], dim=1)
        return _limited(rounded(_mixed(whole, _TO_RGB, (0.0, 0.0, 0.0))), rounded)

    def _planes(self, planes: Tensor, base: tuple[int, ...], rounded: Round) -> Tensor:
        """Planes (N, C, H, W) through blockwise quantisation; edges are filled up by their last values."""
        height, width = planes.shape[2:]
        padded = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate") - 128
        blocks = padded.unfold(2, 8, 8).unfold(3, 8, 8)  # (N, C, rows, columns, 8, 8)
        matrix = torch.tensor(_dct(), dtype=planes.dtype, device=planes.device)
        table = torch.tensor(_scaled(base, self.quality), dtype=planes.dtype, device=planes.device).view(8, 8)
        codes = rounded(matrix @ blocks @ matrix.T / table)
        pixels = matrix.T @ (codes * table) @ matrix
        whole = pixels.transpose(3, 4).reshape(padded.shape)[:, :, :height, :width]
        return _limited(rounded(whole + 128), rounded)


def _round(values: Tensor) -> Tensor:
    """To the nearest whole number, halves up, also where float64's noise puts a half just below itself."""
    return (values + (0.5 + _TIE)).floor()


def _exact(values: Tensor) -> Tensor:
    return values


def _limited(values: Tensor, rounded: Round) -> Tensor:
    return values if rounded is _exact else values.clamp(0, 255)


def _mixed(planes: Tensor, matrix: tuple[tuple[float, ...], ...], offset: tuple[float, ...]) -> Tensor:
    weights = torch.tensor(matrix, dtype=planes.dtype, device=planes.device)
    shift = torch.tensor(offset, dtype=planes.dtype, device=planes.device)
    return torch.einsum("ij,njhw->nihw", weights, planes) + shift.view(1, -1, 1, 1)


def _halved(planes: Tensor, rounded: Round) -> Tensor:
    """Means of 2 × 2 squares, rounded down after libjpeg's alternating bias of 1/4 and 2/4."""
    height, width = planes.shape[2:]
    padded = F.pad(planes, (0, width % 2, 0, height % 2), mode="replicate")
    means = F.avg_pool2d(padded, 2)
    if rounded is _exact:
        return means
    bias = 0.25 + 0.25 * (torch.arange(means.shape[3], device=planes.device) % 2)
    return (means + bias + _TIE).floor()


def _doubled(planes: Tensor, rounded: Round) -> Tensor:
    """Twice the size by libjpeg's "fancy" triangle filter: 3/4 of the nearer and 1/4 of the farther value each way."""
    height, width = planes.shape[2:]
    ring = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    rows = torch.stack([3 * ring[:, :, 1:-1] + ring[:, :, :-2], 3 * ring[:, :, 1:-1] + ring[:, :, 2:]], dim=3)
    tall = rows.reshape(*planes.shape[:2], 2 * height, width + 2)
    here, before, after = tall[..., 1:-1], tall[..., :-2], tall[..., 2:]
    sums = torch.stack([3 * here + before, 3 * here + after], dim=-1)
    wide = sums.reshape(*planes.shape[:2], 2 * height, 2 * width) / 16
    if rounded is _exact:
        return wide
    bias = 0.5 - 0.0625 * (torch.arange(2 * width, device=planes.device) % 2)
    return (wide + bias + _TIE).floor()


@lru_cache(maxsize=256)
def _scaled(base: tuple[int, ...], quality: int) -> tuple[float, ...]:
    """libjpeg's quantisation table of a quality."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    return tuple(float(min(max((value * scale + 50) // 100, 1), 255)) for value in base)


@lru_cache(maxsize=1)
def _dct() -> list[list[float]]:
    """The orthonormal DCT-II of eight values."""
    return [
        [math.sqrt((1 if k == 0 else 2) / 8) * math.cos(math.pi * (2 * i + 1) * k / 16) for i in range(8)]
        for k in range(8)
    ]
