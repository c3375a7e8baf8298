"""What an attacker may change: frozen, stateless geometry of balls inside the model's box.

Norms live here (their equations in `robust.projections`, their fused steps in `robust.cuda_ops`) and nowhere else: an
attack asks its threat to project, to step and to measure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robust import cuda_ops, projections
from robust.ball import SLACK, SPARSE_FRACTION, Bounds, Threat, anywhere, column
from robust.errors import ThreatError, UnknownName
from robust.registry import unknown
from robust.rng import Draws

__all__ = ["L0", "L1", "L2", "SLACK", "THREATS", "Bounds", "Linf", "Patch", "Threat", "make_threat"]


@dataclass(frozen=True, eq=False)
class Linf(Threat):
    """Every coordinate changes by at most `eps`."""

    norm: ClassVar[str] = "linf"

    def check(self, bounds: Bounds) -> None:
        """Refuses a radius wider than the box, which is a forgotten division."""
        largest, width = float(torch.as_tensor(self.eps).max()), bounds[1] - bounds[0]
        if math.isfinite(largest) and largest > width:
            hint = f"; did you mean {largest:g}/255?" if width == 1 and largest <= 255 else ""
            raise ThreatError(f"eps={largest:g} is outside the box [{bounds[0]:g}, {bounds[1]:g}]{hint}")

    def _length(self, delta: Tensor) -> Tensor:
        return delta.abs().amax(1).double()

    def _project(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        eps = column(self.eps, x)
        return x_adv.maximum(x - eps).minimum(x + eps).clamp_(*bounds)

    def _inward(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        if x.dtype == torch.float32 and max(-bounds[0], bounds[1]) <= 1:
            return x_adv  # x ± eps is off by half an ulp of at most 1: 3e-8, within SLACK
        return super()._inward(x_adv, x, bounds)

    def step(
        self,
        at: Tensor,
        gradient: Tensor,
        size: Tensor,
        x: Tensor,
        bounds: Bounds,
        keep: Tensor | float = SPARSE_FRACTION,
    ) -> Tensor:
        """See `Threat.step`."""
        moved = cuda_ops.step_linf(at, gradient, x, size, self.radii(x), *bounds)
        return self._inward(moved, x, bounds)

    def two_terms(
        self,
        at: Tensor,
        before: Tensor,
        gradient: Tensor,
        size: Tensor,
        alpha: Tensor,
        x: Tensor,
        bounds: Bounds,
    ) -> Tensor:
        """See `Threat.two_terms`."""
        moved = cuda_ops.apgd_linf(at, before, gradient, x, size, self.radii(x), alpha, *bounds)
        return self._inward(moved, x, bounds)

    def to_hyperplane(self, x: Tensor, normal: Tensor, gap: Tensor, bounds: Bounds) -> Tensor:
        """See `Threat.to_hyperplane`."""
        return projections.hyperplane_linf(x.flatten(1), normal.flatten(1), gap[:, None], bounds).view_as(x)


@dataclass(frozen=True, eq=False)
class L2(Threat):
    """The change's Euclidean length is at most `eps`; ``L2()`` is unbounded."""

    norm: ClassVar[str] = "l2"

    def _length(self, delta: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(delta, dim=1, dtype=torch.float64)
        return length

    def _project(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        delta, room = (x_adv - x).flatten(1), (x_adv.clamp(*bounds) - x).flatten(1)
        scale = projections.l2_scale(delta, room, column(self.eps, x).flatten(1))
        return torch.lerp(x, x_adv, column(scale[:, 0], x)).clamp_(*bounds)

    def _noise(self, x: Tensor, draws: Draws) -> Tensor:
        count = x[0].numel()
        numbers = draws.normal(count).to(x)
        radius = draws.branch("radius").uniform().to(x)[:, None].pow(1 / count)
        return (F.normalize(numbers, dim=1) * radius).view_as(x)

    def steepest(self, gradient: Tensor, keep: Tensor | float = SPARSE_FRACTION) -> Tensor:
        """See `Threat.steepest`; tiny gradients are scaled up before they are squared."""
        flat = gradient.flatten(1)
        flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-38)
        return F.normalize(flat, dim=1, eps=1e-12).view_as(gradient)

    def dual(self, gradient: Tensor) -> Tensor:
        """See `Threat.dual`; squares of tiny gradients would vanish in float32."""
        length: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
        return length.to(gradient.dtype)

    def step(
        self,
        at: Tensor,
        gradient: Tensor,
        size: Tensor,
        x: Tensor,
        bounds: Bounds,
        keep: Tensor | float = SPARSE_FRACTION,
    ) -> Tensor:
        """See `Threat.step`."""
        moved = cuda_ops.step_l2(at, gradient, x, size, self.radii(x), *bounds)
        return self._inward(moved, x, bounds)

    def two_terms(
        self,
        at: Tensor,
        before: Tensor,
        gradient: Tensor,
        size: Tensor,
        alpha: Tensor,
        x: Tensor,
        bounds: Bounds,
    ) -> Tensor:
        """See `Threat.two_terms`."""
        moved = cuda_ops.apgd_l2(at, before, gradient, x, size, self.radii(x), alpha, *bounds)
        return self._inward(moved, x, bounds)

    def to_hyperplane(self, x: Tensor, normal: Tensor, gap: Tensor, bounds: Bounds) -> Tensor:
        """See `Threat.to_hyperplane`."""
        return projections.hyperplane_l2(x.flatten(1), normal.flatten(1), gap[:, None], bounds).view_as(x)


@dataclass(frozen=True, eq=False)
class L1(Threat):
    """The changes' absolute values sum to at most `eps`."""

    norm: ClassVar[str] = "l1"

    def _length(self, delta: Tensor) -> Tensor:
        return delta.abs().sum(1, dtype=torch.float64)

    def _project(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        delta, room = (x_adv - x).flatten(1), (x_adv.clamp(*bounds) - x).flatten(1)
        shrink = projections.l1_shrink(delta, room, column(self.eps, x).flatten(1))
        step = (delta.abs() - shrink).clamp_min_(0).mul_(delta.sign())  # exactly 0 where it is not changed
        return (x + step.view_as(x)).clamp_(*bounds)

    def _noise(self, x: Tensor, draws: Draws) -> Tensor:
        exponentials = -torch.log1p(-draws.uniform(x[0].numel() + 1).to(x))
        sizes = exponentials[:, :-1] / exponentials.sum(1, keepdim=True)
        return (sizes * draws.branch("signs").signs(x[0].numel()).to(x)).view_as(x)

    def steepest(self, gradient: Tensor, keep: Tensor | float = SPARSE_FRACTION) -> Tensor:
        """Signs of the largest `keep` of the coordinates, scaled to length one (Tramèr & Boneh 2019)."""
        flat = gradient.flatten(1)
        size = flat.abs()
        count = (torch.as_tensor(keep, device=flat.device) * flat.shape[1]).long().clamp(1, flat.shape[1])
        ranked = size.topk(int(count.max()), dim=1).values
        threshold = ranked.gather(1, (count.expand(len(flat)) - 1)[:, None])
        signs = flat.sign() * (size >= threshold)
        return (signs / signs.abs().sum(1, keepdim=True).clamp_min(1)).view_as(gradient)

    def dual(self, gradient: Tensor) -> Tensor:
        """See `Threat.dual`."""
        return gradient.flatten(1).abs().amax(1)

    def step(
        self,
        at: Tensor,
        gradient: Tensor,
        size: Tensor,
        x: Tensor,
        bounds: Bounds,
        keep: Tensor | float = SPARSE_FRACTION,
    ) -> Tensor:
        """See `Threat.step`."""
        kept = torch.as_tensor(keep, dtype=x.dtype, device=x.device).expand(len(x))
        moved = cuda_ops.step_l1(at, gradient, x, size, self.radii(x), *bounds, kept)
        return self._inward(moved, x, bounds)

    def to_hyperplane(self, x: Tensor, normal: Tensor, gap: Tensor, bounds: Bounds) -> Tensor:
        """See `Threat.to_hyperplane`."""
        return projections.hyperplane_l1(x.flatten(1), normal.flatten(1), gap[:, None], bounds).view_as(x)


@dataclass(frozen=True, eq=False)
class _Pixels(Threat):
    """Threats that count or enclose changed pixels and leave their size to the box; no rounding matters to them."""

    def _inward(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        return x_adv

    def random(self, x: Tensor, bounds: Bounds, draws: Draws) -> Tensor:
        """The projection of a keyed random point of the box."""
        return self.project(anywhere(x, bounds, draws), x, bounds)


def _gain(x_adv: Tensor, x: Tensor, boxed: Tensor) -> Tensor:
    """(N, 1, H, W) how much nearer to x_adv, in squared l2, each pixel of the box's nearest point is than x's."""
    return ((boxed - x) * ((x_adv - x) + (x_adv - boxed))).sum(1, keepdim=True)


@dataclass(frozen=True, eq=False)
class L0(_Pixels):
    """At most `eps` pixels change, each in all its channels."""

    norm: ClassVar[str] = "l0"

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(N,) float64 counts of changed pixels."""
        return (x_adv != x).any(1).flatten(1).sum(1).double()

    def _project(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        boxed = x_adv.clamp(*bounds)
        gain = _gain(x_adv, x, boxed)
        rank = gain.flatten(1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        return torch.where((rank + 1 <= column(self.eps, rank.double())).view_as(gain), boxed, x)

    def dual(self, gradient: Tensor) -> Tensor:
        """(N,) gain of the best single pixel per unit of change in each channel."""
        return gradient.abs().sum(1).flatten(1).amax(1)


@dataclass(frozen=True, eq=False)
class Patch(_Pixels):
    """All changes lie in one rectangle of `height` × `width` pixels, anywhere in the image.

    The distance is how many times too large the smallest enclosing rectangle is (at most 1 is inside), so `eps`
    stays 1.
    """

    eps: float | Tensor = 1.0
    height: int = 5
    width: int = 5
    norm: ClassVar[str] = "patch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.height, self.width) < 1:
            raise ThreatError(
                f"a patch of {self.height} × {self.width} pixels is empty; give sides of at least 1"
            )

    def describe(self) -> dict[str, Any]:
        """Norm and sides for JSON."""
        return {**super().describe(), "height": self.height, "width": self.width}

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(N,) float64: the enclosing rectangle's sides over the patch's, the larger of the two; 0 if unchanged."""
        changed = (x_adv != x).any(1)
        sides = []
        for axis, limit in ((2, self.height), (1, self.width)):
            line = changed.any(axis).long()
            first, last = line.argmax(1), line.shape[1] - 1 - line.flip(1).argmax(1)
            sides.append((last - first + 1).double() / limit)
        return torch.where(changed.flatten(1).any(1), torch.maximum(*sides), 0.0)

    def _project(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        boxed = x_adv.clamp(*bounds)
        height, width = min(self.height, x.shape[2]), min(self.width, x.shape[3])
        total = F.avg_pool2d(_gain(x_adv, x, boxed), (height, width), stride=1).flatten(1)
        best = total.argmax(1)
        columns = x.shape[3] - width + 1
        top, left = (best // columns)[:, None], (best % columns)[:, None]
        y_axis, x_axis = torch.arange(x.shape[2], device=x.device), torch.arange(x.shape[3], device=x.device)
        rows = (y_axis >= top) & (y_axis < top + height)
        cols = (x_axis >= left) & (x_axis < left + width)
        return torch.where((rows[:, :, None] & cols[:, None])[:, None], boxed, x)


THREATS: dict[str, type[Threat]] = {"linf": Linf, "l2": L2, "l1": L1, "l0": L0}


def make_threat(norm: str, eps: float | Tensor) -> Threat:
    """A threat by its norm's name (`linf`, `l2`, `l1`, `l0`) and radius."""
    if norm not in THREATS:
        raise UnknownName(unknown("norm", norm, list(THREATS)))
    return THREATS[norm](eps)
