"""What every threat is: a ball of some norm around each sample, inside the model's box; `robust.threat` has the norms.

A point is *inside* if its float64 distance is at most ``eps + SLACK`` and it lies in the box; attacks, `evaluate` and
`verify` share that constant.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from robust.errors import ThreatError, UnknownName
from robust.rng import Draws

SLACK = 1e-7
Bounds = tuple[float, float]
SPARSE_FRACTION = 0.05
_FAR = 1e9  # squares of larger coordinates overflow float32


def column(value: Tensor | float, x: Tensor) -> Tensor:
    """A number or one per sample as (B, 1, …) beside x."""
    column = torch.as_tensor(value, device=x.device)
    column = column if column.dtype == torch.bool else column.to(x.dtype)
    return (
        column.reshape(-1, *[1] * (x.dim() - 1))
        if column.dim()
        else column.expand(len(x), *[1] * (x.dim() - 1))
    )


def anywhere(x: Tensor, bounds: Bounds, draws: Draws) -> Tensor:
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

    def length(self, delta: Tensor) -> Tensor:
        """(N,) lengths of displacements in this norm, to the precision of their dtype."""
        return self._length(delta.flatten(1))

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
            if x.device.type == "cpu" and bool(inside.all()):
                break  # elsewhere looking costs more than going on
            factor = torch.where(inside, 1.0, (eps / most).clamp_max(1) * (1 - shrink))
            x_adv = torch.lerp(x, x_adv, column(factor, x)).clamp_(*bounds)
        return x_adv

    def _length(self, delta: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not measure; use Linf, L2, L1, L0 or Patch")

    def _project(self, x_adv: Tensor, x: Tensor, bounds: Bounds) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not project; use Linf, L2, L1, L0 or Patch")

    def random(self, x: Tensor, bounds: Bounds, draws: Draws) -> Tensor:
        """A keyed random point of ball ∩ box (of the whole box where eps is infinite)."""
        finite = self._finite()
        if not bool(finite.any()):
            return anywhere(x, bounds, draws)
        if bool(finite.all()):
            return self.project(x + self._noise(x, draws) * column(self.eps, x), x, bounds)
        near = self.with_eps(torch.as_tensor(self.eps).nan_to_num(posinf=1.0)).random(x, bounds, draws)
        return torch.where(column(finite.to(x.device), x), near, anywhere(x, bounds, draws))

    def _noise(self, x: Tensor, draws: Draws) -> Tensor:
        """A random displacement of the unit ball."""
        return 2 * draws.uniform(*x.shape[1:]).to(x) - 1

    def steepest(self, gradient: Tensor, keep: Tensor | float = SPARSE_FRACTION) -> Tensor:
        """The direction of length one in this norm along which a linear loss rises most.

        `keep` is the fraction of coordinates that l1 spreads its step over (sparse l1 descent), a number or (N,).
        """
        return gradient.sign()

    def step(
        self,
        at: Tensor,
        gradient: Tensor,
        size: Tensor,
        x: Tensor,
        bounds: Bounds,
        keep: Tensor | float = SPARSE_FRACTION,
    ) -> Tensor:
        """at + size · steepest(gradient), projected on ball ∩ box: one step of a gradient method; size (N,)."""
        return self.project(at + column(size, x) * self.steepest(gradient, keep), x, bounds)

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
        """Auto-PGD's step: z = `step`, then Π(at + alpha (z − at) + (1 − alpha)(at − before)); size, alpha (N,)."""
        moved = self.step(at, gradient, size, x, bounds)
        weight = column(alpha, x)
        return self.project(at + weight * (moved - at) + (1 - weight) * (at - before), x, bounds)

    def radii(self, x: Tensor) -> Tensor:
        """(N,) radii beside x, in its dtype and on its device."""
        return torch.as_tensor(self.eps).to(x).expand(len(x))

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
