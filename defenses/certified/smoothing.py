"""Randomised smoothing: the class that a model gives most often under noise cannot change within a radius."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from robust.certificate import Certificate, Record, classes_and_radii
from robust.defenses.certified.ballot import PRECISIONS, Ballot, Counts, Precision
from robust.defenses.certified.binomial import Array, Plan, check_votes, lower_bound
from robust.defenses.certified.noises import NOISES, Noise
from robust.registry import unknown

_SELECT, _VOTE, _PREDICT = "smoothing/select", "smoothing/vote", "smoothing/predict"
ABSTAIN = -1


@dataclass(frozen=True, eq=False)
class RandomizedSmoothing(Certificate):
    """Randomised smoothing: predict, certify, abstain (Cohen et al. 2019, arXiv:1902.02918), fixed or sequential.

    The smoothed classifier's answer is the class that the voter gives most often under noise. With confidence
    1 − alpha a sample, it is `classes` everywhere within `radii`. The guarantee is for the model that voted
    (`precision`), for noise of the stated distribution, not clipped to the box, and for arithmetic as that model does
    it; noise is Philox's, with 24 bits a number. With confidence 1 − alpha *each*: of N samples about alpha · N may
    be wrong.

    Edge cases: a copy with NaN logits votes for nobody; a class at or below one half abstains (−1, radius 0); all
    votes for one class give the radius of alpha^(1/n), never infinity; an empty batch gives empty answers.

    Attributes:
        sigma: the noise's standard deviation, in the unit of x.
        noise: gaussian (l2), or laplace or uniform (l1; Teng et al. 2020, Yang et al. 2020, arXiv:2002.08118).
        precision: float32 (by the folded twin, which differs by rounding, where there is one), original, or
            bfloat16: the certificate then holds for the bfloat16 model.
        seed: keys the noise, with each sample's identity.
        batch: noisy copies a call; by default what the model's footprint suggests.
    """

    sigma: float = field(default=0.25, kw_only=True)
    noise: str = field(default="gaussian", kw_only=True)
    precision: Precision = field(default="float32", kw_only=True)
    seed: int = field(default=0, kw_only=True)
    batch: int | None = field(default=None, kw_only=True)

    name: ClassVar[str] = "smoothing"
    norms: ClassVar[tuple[str, ...]] = ("l2", "l1")
    guarantee: ClassVar[str] = (
        "with confidence 1 - alpha for each sample, for the smoothed classifier of the model that voted"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(0 < self.sigma < math.inf, f"sigma={self.sigma} is no noise; give a positive number")
        self.require(self.noise in NOISES, unknown("noise", self.noise, list(NOISES)))
        self.require(self.precision in PRECISIONS, unknown("precision", self.precision, list(PRECISIONS)))
        self.require(
            self.batch is None or self.batch > 0, f"batch={self.batch} holds nothing; give 1 or more"
        )

    @property
    def norm(self) -> str:
        """See `Certificate.norm`."""
        return self._noise.norm

    @property
    def _noise(self) -> Noise:
        return NOISES[self.noise]

    def certify(
        self,
        x: Tensor,
        *,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        radii: Sequence[float] = (),
        sequential: bool = False,
        index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Classes and the radii within which the smoothed classifier cannot leave them.

        Args:
            x: (N, C, H, W) in the box.
            n0: votes that choose the class. n: votes that bound its probability, at most.
            alpha: the chance, for each sample, that the radius is too large.
            radii: those to be decided, with `sequential`.
            sequential: stop a sample as soon as every one of `radii` is shown or hopeless (`Plan`): the confidence
                stays exact, and the radius may be smaller than n votes would show.
            index: (N,) the samples' identities, which key the noise; by default 0…N−1.

        Returns:
            Classes (N,) int64, -1 where it abstains, and radii (N,) float64 in the unit of x.
        """
        found = self.records(x, n0=n0, n=n, alpha=alpha, radii=radii, sequential=sequential, index=index)
        return classes_and_radii(found)

    def records(
        self,
        x: Tensor,
        *,
        index: Tensor | None = None,
        n0: int = 100,
        n: int = 10_000,
        alpha: float = 0.001,
        radii: Sequence[float] = (),
        sequential: bool = False,
    ) -> list[Record]:
        """See `Certificate.records`: also the class chosen, the counts of both votes, the bound, and who voted."""
        check_votes(n0, alpha, "n0")
        check_votes(n, alpha)
        for radius in radii:
            self.require(0 <= radius < math.inf, f"radius={radius} cannot be certified; give 0 or more")
        if not len(x):
            return []
        index = torch.arange(len(x)) if index is None else index
        ballot = self._ballot(x, (n0 + n) * len(x))
        selection = ballot.tally(x, index, 0, n0, _SELECT)
        chosen = selection.argmax(1)
        counts = np.zeros_like(selection)

        def draw(rows: Array, first: int, copies: int) -> Array:
            each = torch.from_numpy(rows)
            new = ballot.tally(x[each.to(x.device)], index[each.to(index.device)], first, copies, _VOTE)
            counts[rows] += new
            found: Array = new[np.arange(len(rows)), chosen[rows]]
            return found

        if sequential:
            targets = sorted({0.5, *(self._noise.probability(radius, self.sigma) for radius in radii)})
            decided = Plan(tuple(targets), n, alpha).run(draw, len(x))
            used, lower = decided.used, decided.lower
        else:
            lower = lower_bound(draw(np.arange(len(x)), 0, n), n, alpha)
            used = np.full(len(x), n)
        return self._told(selection, counts, used, lower, ballot.voter)

    def _told(self, selection: Counts, counts: Counts, used: Array, lower: Array, voter: str) -> list[Record]:
        sure = lower > 0.5
        radius = np.where(sure, self._noise.radius(lower, self.sigma), 0.0)
        return [
            {
                "class": int(top) if sure[row] else ABSTAIN,
                "radius": float(radius[row]),
                "chosen": int(top),
                "lower": float(lower[row]),
                "n": int(used[row]),
                "votes": _sparse(counts[row]),
                "selection": _sparse(selection[row]),
                "voter": voter,
            }
            for row, top in enumerate(selection.argmax(1))
        ]

    def predict(
        self, x: Tensor, *, n: int = 1000, alpha: float = 0.001, index: Tensor | None = None
    ) -> Tensor:
        """The smoothed classifier's classes (N,) int64, -1 where it abstains; Cohen et al., PREDICT.

        With confidence 1 − alpha a class that is given is the true majority: the two most frequent classes are
        compared by an exact two-sided binomial test (Hung & Fithian 2019).
        """
        from scipy.stats import binomtest

        check_votes(n, alpha)
        if not len(x):
            return torch.zeros(0, dtype=torch.int64)
        index = torch.arange(len(x)) if index is None else index
        counts = self._ballot(x, n * len(x)).tally(x, index, 0, n, _PREDICT)
        order = np.argsort(-counts, axis=1, kind="stable")
        found = []
        for row, (first, second) in enumerate(order[:, :2]):
            a, b = int(counts[row, first]), int(counts[row, second])
            clear = a + b > 0 and binomtest(a, a + b, 0.5).pvalue <= alpha
            found.append(int(first) if clear else ABSTAIN)
        return torch.tensor(found)

    def conditions(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """See `Certificate.conditions`: also the confidence."""
        return {**super().conditions(settings), "confidence": 1 - settings.get("alpha", 0.001)}

    def _ballot(self, x: Tensor, votes: int) -> Ballot:
        return Ballot(
            self.clf, x, self._noise, self.sigma, seed=self.seed, precision=self.precision, votes=votes,
            batch=self.batch,
        )  # fmt: skip


def _sparse(counts: Counts) -> dict[str, int]:
    """The classes that got votes, for JSON."""
    return {str(label): int(counts[label]) for label in np.flatnonzero(counts)}
