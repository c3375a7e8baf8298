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
from robust.rng import derive

_PICTURES = 10  # of a class, which are tried
_SAMPLES = 64  # of other classes, on which they are


def likeness(trial: Trial, patch: TrainedPatch, towards: int) -> TrainedPatch:
    """The patch with a sample's picture in it: of the surest ones of class `towards`, the one that leads there best.

    Nature's own features of a class are read as that class at many scales and angles, and an ascent that starts from
    them keeps some of that; one from noise ends lower. A class without samples leaves the patch as it is.
    """
    mine = (trial.y == towards).nonzero()[:, 0]
    others = (trial.y != towards).nonzero()[:_SAMPLES, 0]
    if not len(mine) or not len(others):
        return patch
    sure = trial.clean[mine].log_softmax(1)[:, towards].argsort(descending=True, stable=True)
    low, high = trial.bounds
    sides = (patch.texture.shape[1], patch.texture.shape[2])
    pictures = F.interpolate(
        trial.x[mine[sure[:_PICTURES]]].float(), sides, mode="bilinear", antialias=True, align_corners=False
    ).clamp(low, high)
    seed = derive(trial.seed, "patch/likeness", towards)
    best: tuple[float, Tensor] | None = None
    for picture in pictures:
        points = replace(patch, texture=picture).apply(trial.x[others], seed=seed, index=trial.index[others.cpu()])
        scores = trial.answer(Query(where_allowed(trial, others, points), "logits")).scores
        score = float(scores.double().log_softmax(1)[:, towards].mean())
        if best is None or score > best[0]:
            best = (score, picture)
    assert best is not None
    return replace(patch, texture=best[1])
