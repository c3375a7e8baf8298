"""Data augmentation by batches, keyed: a sample's crop and flip depend on its identity and the epoch's seed only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.errors import ConfigError
from robust.rng import Draws


@dataclass(frozen=True)
class Augment:
    """Random shift by up to `crop` pixels over a border of zeros, and a mirror image half of the time.

    Attributes:
        crop: border in pixels, 0 for none (4 is usual for 32 × 32 images).
        flip: whether to mirror left and right with probability 1/2.
    """

    crop: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if self.crop < 0:
            raise ConfigError(f"crop={self.crop} is no border; it must be 0 pixels or more")

    def __call__(self, x: Tensor, index: Tensor, seed: int) -> Tensor:
        """The augmented batch of x (B, C, H, W), whose samples have the identities `index` (B,)."""
        draws = Draws(seed, "augment", index)
        if self.crop:
            x = _shift(x, draws.below(2 * self.crop + 1, 2), self.crop)
        if self.flip:
            mirrored = draws.at(1).uniform(1).reshape(-1, 1, 1, 1) < 0.5
            x = torch.where(mirrored, x.flip(3), x)
        return x


def _shift(x: Tensor, offset: Tensor, border: int) -> Tensor:
    """The windows of x (B, C, H, W), zero-padded by `border`, whose corners lie at `offset` (B, 2)."""
    batch, channels, height, width = x.shape
    rows = offset[:, 0, None] + torch.arange(height, device=x.device)
    columns = offset[:, 1, None] + torch.arange(width, device=x.device)
    sample = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    return F.pad(x, (border,) * 4)[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]
