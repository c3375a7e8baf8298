"""Where a patch's ascent starts: at the picture of a sample of the class that the patch is to lead to."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.patch.trained import TrainedPatch
from robust.attacks.query import Query
from robust.attacks.trial import Trial
from robust.attacks.universal.base import where_allowed
from robust.classifier import misclassified
from robust.rng import derive

_ROUNDS = ((48, 32), (12, 256))  # how many pictures are tried on how many samples of other classes


def likeness(trial: Trial, patch: TrainedPatch, towards: int, rank: int = 0) -> TrainedPatch:
    """The patch with a sample's picture in it: the one of class `towards` that, as it is, fools the most samples.

    With `rank` it is the next best one, and so on, and the first again after the last.

    Nature's own features of a class are read as that class at many scales and angles, and an ascent that starts from
    them keeps some of that; one from noise ends lower. Which picture is surest of its class, or raises the class most,
    says little: what fools does. A class without samples leaves the patch as it is.
    """
    mine = (trial.y == towards).nonzero()[:, 0]
    others = (trial.y != towards).nonzero()[:, 0]
    if not len(mine) or not len(others):
        return patch
    low, high = trial.bounds
    sides = (patch.texture.shape[1], patch.texture.shape[2])
    pictures = F.interpolate(
        trial.x[mine[: _ROUNDS[0][0]]], sides, mode="bilinear", antialias=True, align_corners=False
    ).clamp(low, high)
    seed = derive(trial.seed, "patch/likeness", towards)
    for kept, samples in _ROUNDS:
        pictures = pictures[:kept]
        rates = [_fooled(trial, replace(patch, texture=one), others[:samples], seed) for one in pictures]
        pictures = pictures[torch.tensor(rates).argsort(descending=True, stable=True).to(pictures.device)]
    return replace(patch, texture=pictures[rank % len(pictures)])


def _fooled(trial: Trial, patch: TrainedPatch, rows: Tensor, seed: int) -> float:
    """The share of some samples that are misclassified with the patch; equals are told apart by their true scores."""
    rate = 0.0
    for part in rows.split(64):
        points = patch.apply(trial.x[part], seed=seed, index=trial.index[part.cpu()])
        scores = trial.answer(Query(where_allowed(trial, part, points), "logits")).scores
        own = scores.double().softmax(1).gather(1, trial.y[part, None])[:, 0]
        rate += float((misclassified(scores, trial.y[part]).double() + 1e-3 * (1 - own)).sum())
    return rate / len(rows)
