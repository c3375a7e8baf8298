"""What attack models learn from: a model's answers as rows of features, from reference models in and out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robust.attacks.privacy.signals import (
    log_odds,
    log_probability,
    negative_entropy,
    negative_modified_entropy,
    scaled,
)
from robust.membership import Evidence
from robust.rng import Draws

Features = Callable[[Tensor, Tensor], Tensor]
_CLIP = 50.0  # log-odds beyond it tell nothing more


def posteriors(logits: Tensor, y: Tensor) -> Tensor:
    """(N, classes) posteriors, largest first, as log-odds: a posterior near 1 as a float hides what they tell."""
    return log_odds(logits).clamp(-_CLIP, _CLIP).sort(1, descending=True).values


def everything(logits: Tensor, y: Tensor, top: int = 5) -> Tensor:
    """(N, features) the largest posteriors, the label's, the loss, both entropies, and whether the label is right."""
    told = (scaled, log_probability, negative_entropy, negative_modified_entropy)
    numbers = torch.stack([value(logits, y) for value in told], 1).clamp(-_CLIP, _CLIP)
    right = (logits.argmax(1) == y).double()[:, None]
    return torch.cat([posteriors(logits, y)[:, :top], numbers, right], 1)


def lessons(
    evidence: Evidence, count: int | None, features: Features, samples: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows to learn from: features, labels, and whether the sample was in: a keyed choice of `samples` of them at most.

    Args:
        count: how many reference models are taken, the first ones; None for all.
    """
    inside = evidence.inside[:count]
    share = samples / inside.numel()
    rows = []
    for k, members in enumerate(inside):
        drawn = Draws(evidence.seed, "membership/lessons", evidence.index, k).uniform(1)[:, 0]
        chosen = (drawn < share).nonzero()[:, 0]
        found = features(evidence.reference_logits(k), evidence.y)
        rows.append((found[chosen], evidence.y[chosen], members[chosen]))
    x, y, was_in = (torch.cat(part) for part in zip(*rows, strict=True))
    return x, y, was_in


def standardised(x: Tensor, like: Tensor) -> Tensor:
    """Features (N, F) float32 in units of the deviation of `like` around its mean."""
    mean, deviation = like.mean(0), like.std(0).clamp_min(1e-9)
    return ((x - mean) / deviation).float()
