"""Which classes a multi-targeted attack aims at."""

from __future__ import annotations

from torch import Tensor

from robust.attacks.trial import Trial
from robust.targets import ranking


def ranked_targets(trial: Trial, count: int) -> Tensor:
    """(T, N) the `count` wrong classes with the largest clean logits, the nearest first; at most classes − 1."""
    return ranking(trial.clean, trial.y)[:, : min(count, trial.classes - 1)].T.contiguous()
