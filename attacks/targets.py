"""Which classes a targeted attack aims at."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from robust.attacks.trial import Trial
from robust.errors import RobustError
from robust.oracle import Oracle
from robust.rng import Draws, identities

TargetName = Literal["random", "second", "least-likely"]


def ranked_targets(trial: Trial, count: int) -> Tensor:
    """(T, N) the `count` wrong classes with the largest clean logits, the nearest first; at most classes − 1."""
    return _ranking(trial)[:, : min(count, trial.classes - 1)].T.contiguous()


def named_targets(trial: Trial, name: str) -> Tensor:
    """(N,) wrong classes: "random", "second" (the likeliest wrong one) or "least-likely"."""
    if name not in get_args(TargetName):
        known = ", ".join(get_args(TargetName))
        raise RobustError(f"targets={name!r} is unknown; give classes (N,) or one of {known}")
    if name == "random":
        draws = Draws(trial.seed, "targets", identities(trial.index))
        other = draws.below(trial.classes - 1, 1)[:, 0].to(trial.y)
        return other + (other >= trial.y)
    if isinstance(trial.model, Oracle) and trial.model.answers == "labels":
        raise RobustError(f"targets={name!r} needs scores, and the oracle gives labels; use 'random'")
    ranking = _ranking(trial)
    return ranking[:, 0] if name == "second" else ranking[:, trial.classes - 2]


def _ranking(trial: Trial) -> Tensor:
    """(N, K) classes by clean logit, the largest first, the true one last."""
    scores = trial.clean.nan_to_num(0.0).scatter(1, trial.y[:, None], -torch.inf)
    return scores.argsort(dim=1, descending=True, stable=True)
