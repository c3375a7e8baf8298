"""A patch that was learnt: applied to images at keyed places, measured, printed, and placed in photographs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.patch.placement import Placements, Ranges, inside, placed, upright
from robust.attacks.patch.printing import print_patch
from robust.attacks.trial import Trial
from robust.attacks.universal.perturbation import read_change
from robust.attacks.warp import held
from robust.ball import Bounds
from robust.errors import DataError, RobustError
from robust.rng import Draws, identities
from robust.threat import Patch


@dataclass(eq=False)
class TrainedPatch:
    """A patch and where it may lie.

    Attributes:
        texture: (C, a, b) in the box, on 256 levels of it: what is printed is what was measured.
        mask: (h, w) in [0, 1]: how far the patch covers what is behind it.
        image: height and width of the images that it was learnt on.
        bounds: the model's box.
        ranges: angles and scales that it was learnt for.
        brightness, noise: what it was learnt to stand, in shares of the box's width: light on all of it, and each
            pixel's deviation in print.
        target: the class it leads to; None if it leads away from the true one, or to one class per sample.
        towards: the class that leading away from the true ones was best done by leading to; None if there is none.
        sides: its height and width in pixels at scale 1; None: the mask's h and w.
        history, cost: how the search went, and model passes by name.
    """

    texture: Tensor
    mask: Tensor
    image: tuple[int, int]
    bounds: Bounds
    ranges: Ranges
    brightness: float = 0.0
    noise: float = 0.0
    target: int | None = None
    towards: int | None = None
    sides: tuple[float, float] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)

    @property
    def size(self) -> tuple[float, float]:
        """Height and width in pixels of the images it was learnt on."""
        return (self.mask.shape[0], self.mask.shape[1]) if self.sides is None else self.sides

    @property
    def cover(self) -> Tensor:
        """(1, a, b) the mask at the texture's resolution."""
        return F.interpolate(self.mask[None, None], self.texture.shape[1:], mode="nearest-exact")[0]

    @property
    def area(self) -> float:
        """The share of the image that it covers at scale 1."""
        height, width = self.size
        return float(self.mask.mean()) * height * width / (self.image[0] * self.image[1])

    def apply(
        self,
        x: Tensor,
        *,
        seed: int = 0,
        index: Tensor | None = None,
        angle: float | None = None,
        scale: float | None = None,
        printing: bool = False,
    ) -> Tensor:
        """Images (N, C, H, W) with the patch at random, in their dtype; wholly inside each image.

        Args:
            seed, index: key of the draws, as in `Attack.run`: each image's place is its own, in whatever batch.
            angle, scale: one value for all instead of draws from `ranges`.
            printing: also draw light and print noise.
        """
        self._check(x)
        identity = identities(torch.arange(len(x)) if index is None else index.cpu())
        draws = Draws(seed, "patch", identity)
        where = self.ranges.draw(draws, (x.shape[2], x.shape[3]), self.size)
        if angle is not None or scale is not None:
            turned = where.angle if angle is None else torch.full_like(where.angle, angle)
            sized = where.scale if scale is None else torch.full_like(where.scale, scale)
            where = inside(draws.uniform(4)[:, 2:], turned, sized, (x.shape[2], x.shape[3]), self.size)
        return self.at(x, where, draws if printing else None)

    def at(self, x: Tensor, placements: Placements, draws: Draws | None = None) -> Tensor:
        """Images with the patch at given placements; with `draws` also their light and print noise."""
        texture = self.texture.to(x.device)
        if draws is not None:
            texture = weathered(texture, draws, self.brightness, self.noise, self.bounds)
        return placed(x.float(), texture, self.mask, placements, self.size).clamp(*self.bounds).to(x.dtype)

    def control(self, seed: int = 0) -> TrainedPatch:
        """Keyed noise in the same shape, one colour per pixel: what merely covering that part of an image does."""
        low, high = self.bounds
        draws = Draws(seed, "control", torch.zeros(1, dtype=torch.long))
        noise = draws.uniform(len(self.texture), *(max(round(side), 1) for side in self.size))
        blocks = F.interpolate(noise, self.texture.shape[1:], mode="nearest-exact")[0]
        return replace(self, texture=low + (high - low) * blocks, history=[])

    def points(self, trial: Trial) -> Tensor:
        """The trial's samples with the patch upright at keyed places, as large as the trial's threat allows."""
        assert isinstance(trial.threat, Patch)
        draws = Draws(trial.seed, "patch/upright", identities(trial.index))
        sides = trial.threat.height, trial.threat.width
        where = upright(draws, (trial.x.shape[2], trial.x.shape[3]), sides, self.size)
        return trial.threat.project(self.at(trial.x, where), trial.x, trial.bounds)

    def axes(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Angles and scales within and beyond what it was learnt for, at which its success is worth knowing."""
        turn = min(self.ranges.rotation or 10.0, 90.0)
        angles = tuple(round(turn * step / 2, 2) for step in range(-4, 5))
        low, high = self.ranges.smallest, self.ranges.largest
        scales = {0.75 * low, low, (low + 1) / 2, 1.0, (1 + high) / 2, high, 1.25 * high}
        return angles, tuple(sorted({round(scale, 3) for scale in scales}))

    def place(
        self,
        photo: Tensor,
        at: tuple[float, float] = (0.5, 0.5),
        scale: float = 1.0,
        angle: float = 0.0,
    ) -> Tensor:
        """A photograph (C, H, W) of any size, in the box, with the patch in it.

        Args:
            at: the patch's centre as shares of height and width, from the top left.
            scale: 1 is as large against the photograph's shorter side as against the images it was learnt on.
            angle: degrees, clockwise.
        """
        if photo.dim() != 3 or photo.shape[0] != self.texture.shape[0]:
            raise DataError(
                f"the photograph is {tuple(photo.shape)}; it must be ({self.texture.shape[0]}, H, W)"
            )
        if not scale > 0:
            raise RobustError(f"scale={scale:g} shows no patch; give a positive number")
        height, width = photo.shape[1:]
        factor = scale * min(height, width) / min(self.image)
        where = Placements(
            *(
                torch.tensor([value])
                for value in (float(angle), factor, at[0] * height - 0.5, at[1] * width - 0.5)
            )
        )
        return self.at(photo[None], where)[0]

    def save_png(
        self, path: str | Path, *, width_mm: float = 100.0, dpi: float = 300.0, smooth: bool = True
    ) -> tuple[int, int]:
        """Writes a printable PNG of a stated physical width, and returns its height and width in dots.

        Args:
            width_mm: of the patch on paper; its height follows. What is outside its mask stays white.
            dpi: dots per inch, stored in the file, so that it prints at that size.
            smooth: dots between pixels are interpolated, as placements do; False prints each pixel as a square.
        """
        low, high = self.bounds
        return print_patch(
            (self.texture - low) / (high - low), self.mask, Path(path), width_mm, dpi, smooth=smooth
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with what `load` needs."""
        from robust.checkpoint import write_tensors

        names = ("image", "bounds", "brightness", "noise", "target", "towards", "sides", "history", "cost")
        facts = {"ranges": asdict(self.ranges), **{name: getattr(self, name) for name in names}}
        tensors = {"texture": self.texture, "mask": self.mask}
        write_tensors(Path(path), tensors, {"format": "pt", "patch": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> TrainedPatch:
        """A patch that `save` wrote."""
        tensors, facts = read_change(Path(path), "patch")
        (height, width), (low, high) = facts.pop("image"), facts.pop("bounds")
        ranges = Ranges(**facts.pop("ranges"))
        if facts.get("sides") is not None:
            facts["sides"] = tuple(facts["sides"])
        return cls(tensors["texture"], tensors["mask"], (height, width), (low, high), ranges, **facts)

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.texture.shape[0]:
            raise DataError(
                f"x is {tuple(x.shape)}; this patch fits images (N, {self.texture.shape[0]}, H, W)"
            )


def weathered(texture: Tensor, draws: Draws, brightness: float, noise: float, bounds: Bounds) -> Tensor:
    """(N, C, h, w) the texture as light and print change it, one draw per row, cut to the box."""
    width = bounds[1] - bounds[0]
    light = (2 * draws.branch("light").uniform().to(texture) - 1) * brightness
    grain = draws.branch("print").normal(*texture.shape).to(texture) * noise
    return held(texture + width * (light[:, None, None, None] + grain), *bounds)
