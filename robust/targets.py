"""Classes that a targeted attack aims at, by name."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from robust.errors import RobustError
from robust.rng import Draws, identities

TargetName = Literal["random", "second", "least-likely"]


def named_targets(name: str, scores: Tensor, y: Tensor, seed: int, index: Tensor) -> Tensor:
    """(N,) wrong classes: "random", "second" (the likeliest wrong one) or "least-likely".

    Args:
        scores: (N, K) of the clean points; y: (N,) true classes; seed, index: key of the random ones.

    Raises:
        RobustError: the name is unknown.
    """
    if name not in get_args(TargetName):
        known = ", ".join(get_args(TargetName))
        raise RobustError(f"targets={name!r} is unknown; give classes (N,) or one of {known}")
    if name == "random":
        draws = Draws(seed, "targets", identities(index.cpu()))
        other = draws.below(scores.shape[1] - 1, 1)[:, 0].to(y)
        return other + (other >= y)
    ranked = ranking(scores, y)
    return ranked[:, 0] if name == "second" else ranked[:, -2]


def ranking(scores: Tensor, y: Tensor) -> Tensor:
    """(N, K) classes by score, the largest first, the true one last."""
    wrong = scores.nan_to_num(0.0).scatter(1, y[:, None], -torch.inf)
    return wrong.argsort(dim=1, descending=True, stable=True)
