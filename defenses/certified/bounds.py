"""What bounds have in common: margins below which no point of a ball comes, and the largest ball that they prove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from robust.certificate import Certificate, Record, classes_and_radii
from robust.classifier import FLOAT_NOISE
from robust.defenses.certified.graph import Step, trace
from robust.threat import Threat, make_threat


@dataclass(frozen=True, eq=False)
class Bounds(Certificate):
    """The base of ibp and crown: lower bounds of every margin over ball ∩ box, computed in float64.

    A margin counts as proved above the float32 noise of the largest |logit|, so that the promise holds for the
    float32 model on other machines.

    Attributes:
        threat_norm: the ball's norm; its radius is given at each call.
    """

    threat_norm: str = field(default="linf", kw_only=True)

    guarantee: ClassVar[str] = "certain, for every point of ball and box, and the model in float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.threat_norm in self.norms,
            f"has no {self.threat_norm} form; it knows {', '.join(self.norms)}",
        )

    @property
    def norm(self) -> str:
        """See `Certificate.norm`."""
        return self.threat_norm

    @cached_property
    def steps(self) -> list[Step]:
        """The network's steps."""
        return trace(self.clf, self.name)

    def logits(self, lower: Tensor, upper: Tensor, classes: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """(N, K) lower bounds of logit[class] − logit[k] over the points of ball and box; the class's own is 0."""
        raise NotImplementedError

    def margins(self, x: Tensor, classes: Tensor, eps: Tensor | float) -> Tensor:
        """(N,) lower bounds, in float64, of the margin of `classes` over every point of ball ∩ box.

        Args:
            x: (N, C, H, W) in the box. classes: (N,). eps: a radius, or (N,) with one per sample.
        """
        x = x.to(self.clf.device, torch.float64)
        radius = torch.as_tensor(eps, dtype=torch.float64, device=x.device).expand(len(x))
        wide = radius.view(-1, *[1] * (x.dim() - 1))
        lower, upper = ((x + sign * wide).clamp(*self.clf.bounds) for sign in (-1, 1))
        with self.clf.session():
            found = self.logits(lower, upper, classes, x, radius)
        return found.scatter(1, classes[:, None], torch.inf).amin(1)

    def ball(self) -> Threat:
        """The threat's geometry, without a radius."""
        return make_threat(self.threat_norm, math.inf)

    def certify(
        self, x: Tensor, *, radii: Sequence[float] = (), largest: float | None = None, steps: int = 6
    ) -> tuple[Tensor, Tensor]:
        """The model's classes (N,) int64 and the radii (N,) float64 within which no point of the box leaves them.

        Args:
            x: (N, C, H, W) in the box.
            radii: tried as they are; `steps` halvings find the largest ball between them.
            largest: no larger radius is tried; by default the largest of `radii`, else the box's width.
        """
        found = self.records(x, radii=radii, largest=largest, steps=steps)
        return classes_and_radii(found)

    def records(
        self,
        x: Tensor,
        *,
        index: Tensor | None = None,
        radii: Sequence[float] = (),
        largest: float | None = None,
        steps: int = 6,
    ) -> list[Record]:
        """See `Certificate.records`."""
        for radius in radii:
            self.require(0 <= radius < math.inf, f"radius={radius} cannot be certified; give 0 or more")
        if not len(x):
            return []
        self.clf.check(x)
        logits = self.clf.logits(x.to(self.clf.device, torch.float32))
        classes = logits.argmax(1)
        noise = FLOAT_NOISE * logits.abs().amax(1).double()
        width = self.clf.bounds[1] - self.clf.bounds[0]
        tried = sorted({*radii, largest or max(radii, default=width)} - {0.0})
        safe = torch.zeros(len(x), dtype=torch.float64, device=logits.device)
        unsafe = torch.full_like(safe, torch.inf)

        def attempt(eps: Tensor) -> None:
            proved = self.margins(x, classes, eps) > noise
            safe.copy_(torch.where(proved, torch.maximum(safe, eps), safe))
            unsafe.copy_(torch.where(proved, unsafe, torch.minimum(unsafe, eps)))

        for radius in tried:
            attempt(torch.full_like(safe, radius))
        for _ in range(steps):
            open_rows = unsafe.isfinite() & (unsafe > safe)
            if not bool(open_rows.any()):
                break
            attempt(torch.where(open_rows, (safe + unsafe) / 2, safe))
        return [
            {"class": int(c), "radius": float(r), "voter": "float32, by bounds in float64"}
            for c, r in zip(classes, safe, strict=True)
        ]


def concretise(a: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """(N, S) the least of ⟨a, z⟩ over the box lower ≤ z ≤ upper; a (N, S, …), the box (N, …)."""
    flat, low, high = a.flatten(2), lower.flatten(1)[:, None], upper.flatten(1)[:, None]
    return (flat.clamp_min(0) * low + flat.clamp_max(0) * high).sum(2)


def differences(classes: Tensor, count: int) -> Tensor:
    """(N, K, K) rows that take logit[class] − logit[k] of the logits."""
    eye = torch.eye(count, dtype=torch.float64, device=classes.device)
    return eye[classes][:, None] - eye[None]
