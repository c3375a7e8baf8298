"""What an attacker may change: frozen, stateless geometry of balls inside the model's box.

Norms live here (their equations in `robust.projections`) and nowhere else: an attack asks its threat to project,
to step and to measure. A point is *inside* if its float64 distance is at most ``eps + SLACK`` and it lies in the
box; attacks, `evaluate` and `verify` share that constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from robust import projections
from robust.errors import ThreatError, UnknownName
from robust.registry import unknown
from robust.rng import Draws

SLACK = 1e-7
Bounds = tuple[float, float]
_SPARSE_FRACTION = 0.05
_FAR = 1e9  # squares of larger coordinates overflow float32


def _column(value: Tensor | float, x: Tensor) -> Tensor:
    """A number or one per sample as (B, 1, …) beside x."""
    column = torch.as_tensor(value, device=x.device)
    column = column if column.dtype == torch.bool else column.to(x.dtype)
    return (
        column.reshape(-1, *[1] * (x.dim() - 1))
        if column.dim()
        else column.expand(len(x), *[1] * (x.dim() - 1))
    )


def _anywhere(x: Tensor, bounds: Bounds, draws: Draws) -> Tensor:
    """A keyed random point of the box."""
    low, high = bounds
    return low + (high - low) * draws.uniform(*x.shape[1:]).to(x)


@dataclass(frozen=True, eq=False)
class Threat:
    """A ball of radius `eps` around each sample, cut by the model's box.

    Attributes:
        eps: radius in the unit of x (pixels for `L0`); a number, or (N,) with one per sample. Infinite means
            unbounded, for minimum-norm attacks.
    """

    eps: float | Tensor = math.inf
    norm: ClassVar[str] = ""

    def __post_init__(self) -> None:
        values = torch.as_tensor(self.eps, dtype=torch.float64)
        if values.dim() > 1:
            raise ThreatError(
                f"eps has shape {tuple(values.shape)}; it is one number, or (N,) with one per sample"
            )
        wrong = values[~(values > 0)]
        if values.numel() == 0 or len(wrong):
            shown = f"{wrong.reshape(-1)[0]:g}" if len(wrong) else "[]"
            raise ThreatError(f"eps={shown} is no radius; it must be a positive number such as 8/255")

    def _identity(self) -> tuple[Any, ...]:
        values = torch.as_tensor(self.eps, dtype=torch.float64)
        others = (getattr(self, field.name) for field in fields(self) if field.name != "eps")
        return (type(self), tuple(values.shape), tuple(values.reshape(-1).tolist()), *others)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Threat) and self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def check(self, bounds: Bounds) -> None:
        """Raises `ThreatError` when eps cannot be meant for the box `bounds`."""

    def take(self, rows: Tensor) -> Self:
        """The threat of some samples, when eps is one per sample; itself otherwise."""
        if isinstance(self.eps, Tensor) and self.eps.dim():
            return replace(self, eps=self.eps[rows.to(self.eps.device)])
        return self

    def with_eps(self, eps: float | Tensor) -> Self:
        """The same geometry at another radius."""
        return replace(self, eps=eps)

    @property
    def bounded(self) -> bool:
        """Whether every sample has a finite radius."""
        return bool(self._finite().all())

    @property
    def radius(self) -> float:
        """The largest eps as a number."""
        return float(torch.as_tensor(self.eps, dtype=torch.float64).max())

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """(N,) float64 distances in this norm."""
        return self._length((x_adv.double() - x.double()).flatten(1))

    def inside(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        """(N,) bool: within eps + SLACK in float64, inside the box, and finite."""
        flat = x_adv.flatten(1)
        boxed = (flat.amin(1) >= bounds[0]) & (flat.amax(1) <= bounds[1])
        eps = torch.as_tensor(self.eps, dtype=torch.float64, device=x.device)
        return boxed & (self.distance(x_adv, x) <= eps + SLACK)

    def project(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        """The nearest point (in l2) of ball ∩ box, rounded inward.

        Args:
            x_adv: (N, C, H, W) any points; x: (N, C, H, W) the balls' centres, in the box.
            bounds: the model's box.

        Returns:
            Points for which `inside` holds. A coordinate that is NaN is the centre's; beyond ±1e9 it counts as 1e9.
        """
        low, high = x_adv.aminmax() if len(x_adv) else (x_adv.sum(), x_adv.sum())
        if not bool((low >= -_FAR) & (high <= _FAR)):
            x_adv = torch.where(x_adv.isnan(), x, x_adv).clamp(-_FAR, _FAR)
        if not bool(self._finite().any()):
            return x_adv.clamp(*bounds)
        return self._inward(self._project(x_adv, x, bounds), x, bounds)

    def _finite(self) -> Tensor:
        return torch.isfinite(torch.as_tensor(self.eps))

    def _inward(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        """Shrinks the rows that rounding pushed out of the ball; a row that stays out becomes its centre."""
        eps = torch.as_tensor(self.eps, dtype=torch.float64, device=x.device)
        # A difference of floats is right to half an ulp, which this covers: no pass in float64.
        error = 1 + torch.finfo(x.dtype).eps
        for shrink in (1e-6, 1e-5, 1e-4, 1.0):
            most = self._length((x_adv - x).flatten(1)) * error
            inside = most <= eps + SLACK / 2
            if bool(inside.all()):
                break
            factor = torch.where(inside, 1.0, (eps / most).clamp_max(1) * (1 - shrink))
            x_adv = torch.lerp(x, x_adv, _column(factor, x)).clamp_(*bounds)
        return x_adv

    def _length(self, delta: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not measure; use Linf, L2, L1, L0 or Patch")

    def _project(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not project; use Linf, L2, L1, L0 or Patch")

    def random(self, x: Tensor, bounds: Bounds, draws: Draws) -> Tensor:
        """A keyed random point of ball ∩ box (of the whole box where eps is infinite)."""
        finite = self._finite()
        if not bool(finite.any()):
            return _anywhere(x, bounds, draws)
        if bool(finite.all()):
            return self.project(x + self._noise(x, draws) * _column(self.eps, x), x, bounds)
        near = self.with_eps(torch.as_tensor(self.eps).nan_to_num(posinf=1.0)).random(x, bounds, draws)
        return torch.where(_column(finite.to(x.device), x), near, _anywhere(x, bounds, draws))

    def _noise(self, x: Tensor, draws: Draws) -> Tensor:
        """A random displacement of the unit ball."""
        return 2 * draws.uniform(*x.shape[1:]).to(x) - 1

    def steepest(self, gradient: Tensor, keep: Tensor | float = _SPARSE_FRACTION) -> Tensor:
        """The direction of length one in this norm along which a linear loss rises most.

        `keep` is the fraction of coordinates that l1 spreads its step over (sparse l1 descent), a number or (N,).
        """
        return gradient.sign()

    def dual(self, gradient: Tensor) -> Tensor:
        """(N,) dual norm of a gradient: the loss gained per unit of distance."""
        return gradient.flatten(1).abs().sum(1)

    def to_hyperplane(self, x: Tensor, normal: Tensor, gap: Tensor, bounds: Bounds) -> Tensor:
        """The shortest d with ⟨normal, d⟩ = gap and x + d in the box; its corner where none reaches. gap: (N,)."""
        raise UnknownName(f"no projection onto hyperplanes in {self.norm}; known are linf, l2, l1")

    def describe(self) -> dict[str, Any]:
        """Norm and radius for JSON; radii per sample as a list."""
        eps = self.eps.tolist() if isinstance(self.eps, Tensor) else float(self.eps)
        return {"norm": self.norm, "eps": eps}


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
        eps = _column(self.eps, x)
        return x_adv.maximum(x - eps).minimum(x + eps).clamp_(*bounds)

    def _inward(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        if x.dtype == torch.float32 and max(-bounds[0], bounds[1]) <= 1:
            return x_adv  # x ± eps is off by half an ulp of at most 1: 3e-8, within SLACK
        return super()._inward(x_adv, x, bounds)

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
        scale = projections.l2_scale(delta, room, _column(self.eps, x).flatten(1))
        return torch.lerp(x, x_adv, _column(scale[:, 0], x)).clamp_(*bounds)

    def _noise(self, x: Tensor, draws: Draws) -> Tensor:
        count = x[0].numel()
        numbers = draws.normal(count).to(x)
        radius = draws.branch("radius").uniform().to(x)[:, None].pow(1 / count)
        return (F.normalize(numbers, dim=1) * radius).view_as(x)

    def steepest(self, gradient: Tensor, keep: Tensor | float = _SPARSE_FRACTION) -> Tensor:
        """See `Threat.steepest`; tiny gradients are scaled up before they are squared."""
        flat = gradient.flatten(1)
        flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-38)
        return F.normalize(flat, dim=1, eps=1e-12).view_as(gradient)

    def dual(self, gradient: Tensor) -> Tensor:
        """See `Threat.dual`; squares of tiny gradients would vanish in float32."""
        length: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=torch.float64)
        return length.to(gradient.dtype)

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
        shrink = projections.l1_shrink(delta, room, _column(self.eps, x).flatten(1))
        step = (delta.abs() - shrink).clamp_min_(0).mul_(delta.sign())  # exactly 0 where it is not changed
        return (x + step.view_as(x)).clamp_(*bounds)

    def _noise(self, x: Tensor, draws: Draws) -> Tensor:
        exponentials = -torch.log1p(-draws.uniform(x[0].numel() + 1).to(x))
        sizes = exponentials[:, :-1] / exponentials.sum(1, keepdim=True)
        return (sizes * draws.branch("signs").signs(x[0].numel()).to(x)).view_as(x)

    def steepest(self, gradient: Tensor, keep: Tensor | float = _SPARSE_FRACTION) -> Tensor:
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
        return self.project(_anywhere(x, bounds, draws), x, bounds)


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
        return torch.where((rank + 1 <= _column(self.eps, rank.double())).view_as(gain), boxed, x)

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
