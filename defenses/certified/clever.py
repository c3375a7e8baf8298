"""CLEVER: how far the nearest adversarial point may be, estimated from gradients; a number that promises nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from robust.certificate import Certificate, Record, classes_and_radii
from robust.defenses.certified.binomial import Array
from robust.rng import Draws
from robust.threat import make_threat

_CHUNK = 128  # gradients a call


@dataclass(frozen=True, eq=False)
class CLEVER(Certificate):
    """CLEVER score (Weng et al. 2018, arXiv:1801.10578): an estimate of the least distance, not a certificate.

    For each other class the largest gradient norm of the margin is extrapolated from maxima over random points of
    the ball by a reverse Weibull distribution; its end, and so the score, may be wrong on either side. Attacks
    may find points that are nearer. Where the fit fails, the largest norm seen stands for its end.

    Attributes:
        threat_norm: linf, l2 or l1. seed: keys the points.
        batches, samples: maxima that are fitted, and points of which each is the largest.
        targets: the classes nearest to the first that are looked at; 0 takes all.
    """

    threat_norm: str = field(default="linf", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    batches: int = field(default=50, kw_only=True)
    samples: int = field(default=64, kw_only=True)
    targets: int = field(default=0, kw_only=True)

    name: ClassVar[str] = "clever"
    kind: ClassVar[str] = "estimate"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    guarantee: ClassVar[str] = "none: an estimate, which attacks may beat"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            self.threat_norm in self.norms,
            f"has no {self.threat_norm} form; it knows {', '.join(self.norms)}",
        )
        for key, least in (("batches", 3), ("samples", 1), ("targets", 0)):
            value = getattr(self, key)
            self.require(value >= least, f"{key}={value} is too few; give at least {least}")

    @property
    def norm(self) -> str:
        """See `Certificate.norm`."""
        return self.threat_norm

    def certify(
        self, x: Tensor, *, radii: Sequence[float] = (), index: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The model's classes (N,) int64 and the *estimated* radii (N,) float64, at most the largest of `radii`.

        Args:
            x: (N, C, H, W) in the box.
            radii: the largest is the ball in which gradients are sampled; by default a tenth of the box's width.
        """
        found = self.records(x, radii=radii, index=index)
        return classes_and_radii(found)

    def records(self, x: Tensor, *, index: Tensor | None = None, radii: Sequence[float] = ()) -> list[Record]:
        """See `Certificate.records`."""
        width = self.clf.bounds[1] - self.clf.bounds[0]
        ball = max(radii, default=0.1 * width)
        self.require(0 < ball < math.inf, f"radius={ball} is no ball to sample; give a positive radius")
        if not len(x):
            return []
        self.clf.check(x)
        x = x.to(self.clf.device, torch.float32)
        index = torch.arange(len(x)) if index is None else index
        with self.clf.session():
            return [self._record(point, int(who), ball) for point, who in zip(x, index, strict=True)]

    def _record(self, point: Tensor, who: int, ball: float) -> Record:
        logits = self.clf.logits(point[None])[0]
        order = logits.argsort(descending=True)
        others = order[1 : self.targets + 1] if self.targets else order[1:]
        norms = self._norms(point, who, ball, order[0], others)
        gaps = (logits[order[0]] - logits[others]).double().cpu().numpy()
        scores = [_score(float(gap), norms[:, :, k], ball) for k, gap in enumerate(gaps)]
        return {"class": int(order[0]), "radius": min(scores), "voter": "float32, the original"}

    def _norms(self, point: Tensor, who: int, ball: float, first: Tensor, others: Tensor) -> Array:
        """(batches, samples, targets) dual norms of the margins' gradients at random points of the ball."""
        threat, total = make_threat(self.threat_norm, ball), self.batches * self.samples
        found = []
        for start in range(0, total, _CHUNK):
            count = min(_CHUNK, total - start)
            many = point[None].expand(count, *point.shape).contiguous()
            identity = torch.full((count,), who, dtype=torch.int64, device=point.device)
            steps = torch.arange(start, start + count, device=point.device)
            at = threat.random(many, self.clf.bounds, Draws(self.seed, "clever", identity, steps))
            at = at.detach().requires_grad_(True)
            with torch.enable_grad():
                logits = self.clf(at)
                margins = logits[:, first, None] - logits[:, others]
                gradients = [
                    torch.autograd.grad(column.sum(), at, retain_graph=True)[0]
                    for column in margins.unbind(1)
                ]
            found.append(torch.stack([threat.dual(gradient) for gradient in gradients], 1))
        norms: Array = torch.cat(found).double().cpu().numpy()
        return norms.reshape(self.batches, self.samples, -1)


def _score(gap: float, norms: Array, ball: float) -> float:
    """min(gap / Lipschitz constant, ball), the constant being the end of a reverse Weibull fit to the maxima."""
    end = _end(norms.max(1))
    return min(gap / end, ball) if end > 0 else ball


def _end(maxima: Array) -> float:
    """The location of the reverse Weibull distribution by maximum likelihood; never below what was seen."""
    from scipy.stats import weibull_max

    seen, spread = float(maxima.max()), float(np.ptp(maxima))
    if spread <= 1e-9 * seen:
        return seen  # a linear model: the gradient is the same everywhere
    scaled = (maxima - seen) / spread
    with np.errstate(all="ignore"):
        _, location, _ = weibull_max.fit(scaled, 1.0, loc=0.1, scale=1.0)
    end = seen + spread * float(location)
    return max(end, seen) if math.isfinite(end) and end <= 10 * seen else seen
