"""Receiver operating characteristics: how well scores tell one kind of input from another, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust.errors import RobustError

Array = NDArray[Any]


@dataclass(frozen=True)
class ROC:
    """The curve of a detector: at every threshold the part of clean inputs flagged, and of adversarial ones.

    Attributes:
        fpr, tpr: from (0, 0) to (1, 1), one point for every distinct score; an input is flagged above the threshold.
        auc: the chance that an adversarial input scores higher than a clean one, ties counting half.
        interval: 95 %, after DeLong et al. 1988; on the scale of the log-odds, so that it stays in [0, 1].
    """

    fpr: Array
    tpr: Array
    auc: float
    interval: tuple[float, float]

    def tpr_at(self, fpr: float) -> float:
        """The largest part of adversarial inputs that is flagged while at most `fpr` of the clean ones are."""
        return self.point_at(fpr)[1]

    def point_at(self, fpr: float) -> tuple[float, float]:
        """The corner (false, true) of the curve farthest up while the false-positive rate is at most `fpr`."""
        place = int((self.fpr <= fpr + 1e-12).sum()) - 1
        return float(self.fpr[place]), float(self.tpr[place])

    def thinned(self, points: int = 200) -> list[list[float]]:
        """The curve's corners, or as many of them as tell it well: all of the left tenth first, as pairs for JSON."""
        pairs = np.stack([self.fpr, self.tpr], 1)
        if len(pairs) > points:
            grid = np.concatenate([[0.0], np.geomspace(1e-4, 1, points // 2), np.linspace(0, 1, points // 2)])
            rows = np.unique(np.searchsorted(self.fpr, np.sort(grid), side="right") - 1)
            pairs = pairs[np.unique(np.concatenate([rows, [0, len(pairs) - 1]]))]
        return [[round(float(a), 6), round(float(b), 6)] for a, b in pairs]


def roc(clean: Sequence[float] | Array, adversarial: Sequence[float] | Array) -> ROC:
    """The ROC of scores, higher meaning adversarial; infinities are scores like others.

    Raises:
        RobustError: there are no clean or no adversarial scores, or a score is no number.
    """
    negative, positive = (np.asarray(part, dtype=np.float64).ravel() for part in (clean, adversarial))
    if not len(negative) or not len(positive):
        raise RobustError(
            f"{len(negative)} clean and {len(positive)} adversarial scores make no curve; give both"
        )
    if np.isnan(negative).any() or np.isnan(positive).any():
        raise RobustError("a score is no number; a detector's scores are finite, or infinite")
    levels = np.unique(np.concatenate([negative, positive]))[::-1]
    above = [len(part) - np.searchsorted(np.sort(part), levels, side="left") for part in (negative, positive)]
    fpr, tpr = (
        np.concatenate([[0.0], count / len(part)])
        for count, part in zip(above, (negative, positive), strict=True)
    )
    area = float(np.sum(np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2))
    return ROC(fpr, tpr, area, _interval(area, negative, positive))


def _interval(area: float, negative: Array, positive: Array) -> tuple[float, float]:
    """DeLong's variance of the area, by how much each input's own score moves it; at 0 and 1 a bound for no event."""
    n, m = len(negative), len(positive)
    if area in (0.0, 1.0):
        far = 3.0 / min(n, m)  # the rule of three
        return (max(1 - far, 0.0), 1.0) if area == 1.0 else (0.0, min(far, 1.0))
    if min(n, m) < 2:
        return 0.0, 1.0
    low, high = np.sort(negative), np.sort(positive)
    of_positive = (np.searchsorted(low, positive, "left") + np.searchsorted(low, positive, "right")) / (2 * n)
    of_negative = 1 - (np.searchsorted(high, negative, "left") + np.searchsorted(high, negative, "right")) / (
        2 * m
    )
    error = math.sqrt(of_positive.var(ddof=1) / m + of_negative.var(ddof=1) / n)
    odds, spread = math.log(area / (1 - area)), 1.959964 * error / (area * (1 - area))
    return _logistic(odds - spread), _logistic(odds + spread)


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0
