"""Query blinding: each query is changed at random, a little, so that queries look less alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.oracle import Backend
from robust.rng import Draws


@dataclass(frozen=True, kw_only=True)
class Blinding:
    """Random affine maps, brightness, contrast and noise (Chen et al. 2019, arXiv:1907.05587, section 6.1).

    Attributes:
        turn: degrees to either side. shift: of the image's side. zoom: to either side of 1.
        light: added brightness to either side, of the box's width. contrast: to either side of 1.
        noise: standard deviation, of the box's width.
    """

    turn: float = 10.0
    shift: float = 0.06
    zoom: float = 0.1
    light: float = 0.05
    contrast: float = 0.1
    noise: float = 0.02

    def __call__(self, x: Tensor, bounds: tuple[float, float], draws: Draws) -> Tensor:
        """A change of each of x (N, C, H, W), in the box."""
        if not len(x):
            return x
        u = (draws.branch("affine").uniform(6).to(x) * 2 - 1).unbind(1)
        angle, scale = u[0] * self.turn * torch.pi / 180, 1 + u[1] * self.zoom
        row = torch.stack([angle.cos() / scale, -angle.sin() / scale, 2 * self.shift * u[2]], 1)
        other = torch.stack([angle.sin() / scale, angle.cos() / scale, 2 * self.shift * u[3]], 1)
        grid = F.affine_grid(torch.stack([row, other], 1), list(x.shape), align_corners=False)
        moved = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
        width = bounds[1] - bounds[0]
        each = (-1, 1, 1, 1)
        mean = moved.mean((1, 2, 3), keepdim=True)
        lit = (
            (moved - mean) * (1 + u[4].view(each) * self.contrast)
            + mean
            + u[5].view(each) * self.light * width
        )
        noise = draws.branch("noise").normal(*x.shape[1:]).to(x) * self.noise * width
        return (lit + noise).clamp(*bounds)


class Blinded(Backend):
    """What an attacker asks who knows that queries are watched: every one is changed at random before it is sent.

    Args:
        backend: whom it asks. bounds: the box. seed: keys the changes, with the query's number.
    """

    def __init__(
        self,
        backend: Callable[[Tensor], Tensor],
        bounds: tuple[float, float],
        *,
        blinding: Blinding = Blinding(),
        seed: int = 0,
    ) -> None:
        self.backend, self.bounds, self.blinding, self.seed = backend, bounds, blinding, seed
        self.name, self._sent = "blinded", 0

    def __call__(self, x: Tensor) -> Tensor:
        """The backend's answer to changed queries."""
        numbers = torch.arange(self._sent, self._sent + len(x), device=x.device)
        self._sent += len(x)
        return self.backend(self.blinding(x, self.bounds, Draws(self.seed, "blinding", numbers)))
