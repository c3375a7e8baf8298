"""How well scores tell members from non-members: true positives at a low false-positive rate first, and chance beside.

Carlini et al. 2022 (arXiv:2112.03570): an attack that is right about few samples for certain is a leak, though its
average is near a coin's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from robust.errors import DataError
from robust.report import clopper_pearson
from robust.roc import ROC, roc

RATES = (0.001, 0.01)  # of false positives, in the table
LEVEL = 0.0125  # of each rate: with the 2.5 % of the area's lower end, 5 % for all three numbers


def measure(scores: Tensor, members: Tensor) -> dict[str, Any]:
    """What the scores (N,) of samples tell about `members` (N,) bool, JSON-ready.

    Returns:
        ``auc`` with its 95 % ``interval`` (DeLong); ``tpr`` by false-positive rate: the true-positive rate with its
        exact 95 % interval (Clopper-Pearson, for the threshold as it stands), the rate of false positives that it
        really has, and ``chance``, the exact probability of as many true positives if members and others were scored
        alike; ``balanced_accuracy`` at the threshold that is best on these very samples, which flatters a little;
        ``at_chance``: whether none of area and rates is above chance, at 5 % for all together; ``curve``.

    Raises:
        DataError: there are no members or no others.
    """
    count = int(members.sum())
    if not 0 < count < len(members):
        raise DataError(f"{count} of {len(members)} samples are members; an attack is measured on both kinds")
    curve = roc(scores[~members].numpy(), scores[members].numpy())
    rates = {f"{rate:g}": _at(curve, rate, count, len(members) - count) for rate in RATES}
    low, high = curve.interval
    found = {
        "auc": curve.auc,
        "interval": [low, high],
        "tpr": rates,
        "balanced_accuracy": float(((curve.tpr + 1 - curve.fpr) / 2).max()),
        "at_chance": low <= 0.5 and all(told["chance"] > LEVEL for told in rates.values()),
    }
    return {**found, "curve": curve.thinned()}


def _at(curve: ROC, rate: float, members: int, others: int) -> dict[str, Any]:
    false, true = curve.point_at(rate)
    count, wrong = round(true * members), round(false * others)
    return {
        "count": count,
        "of": members,
        "fraction": true,
        "interval": list(clopper_pearson(count, members)),
        "false": wrong,
        "false_of": others,
        "chance": chance(count, members, wrong, others),
    }


def chance(count: int, members: int, wrong: int, others: int) -> float:
    """Pr[at least `count` members above the threshold with `wrong` others above it], if all are scored alike.

    The threshold lies below the `wrong` highest others, so the number of members above it is negative hypergeometric;
    ties only make the true chance smaller.
    """
    from scipy.stats import nhypergeom

    if count == 0 or wrong >= others:
        return 1.0
    return float(np.clip(nhypergeom.sf(count - 1, members + others, members, wrong + 1), 0.0, 1.0))
