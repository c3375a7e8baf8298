"""Which classes a multi-targeted attack aims at."""

from __future__ import annotations

from torch import Tensor

from robust.attacks.trial import Trial


def ranked_targets(trial: Trial, count: int) -> Tensor:
    """(T, N) the `count` wrong classes with the largest clean logits, the nearest first; at most classes − 1."""
    scores = trial.clean.nan_to_num(0.0).scatter(1, trial.y[:, None], -float("inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    return order[:, : min(count, trial.classes - 1)].T.contiguous()
