"""The one place where a point is declared misclassified: the original model, in float32, eager, unfolded.

`evaluate`, `verify` and the attacks' last word all use `decide`, so that they cannot disagree. For a randomised model
the outcome is the majority over keyed draws, which belong to the sample and not to the batch it shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.classifier import Classifier, clear, misclassified
from robust.oracle import Oracle
from robust.rng import derive, seeded

DRAWS = 25
BATCH = 64


@dataclass(frozen=True)
class Decision:
    """Outcome per sample.

    Attributes:
        hit: (N,) bool: misclassified, or at the target.
        sure: (N,) bool: the outcome is outside float noise.
        prediction: (N,) predicted class, -1 for NaN; of a randomised model the most frequent one.
        firm: (N,) bool: the predicted class itself, which may be one of several wrong ones, is outside float noise.
        confidence: (N,) softmax probability of the prediction; 0 for NaN and for an oracle, which may give labels only.
    """

    hit: Tensor
    sure: Tensor
    prediction: Tensor
    firm: Tensor
    confidence: Tensor


def outcome(
    model: Classifier | Oracle, x: Tensor, y: Tensor, index: Tensor, seed: int, targets: Tensor | None = None
) -> Decision:
    """`decide` for a classifier; for an oracle the answers it gives, which count as queries."""
    if isinstance(model, Classifier):
        return decide(model, x, y, targets, index=index, seed=seed)
    prediction = model.labels(x).cpu()
    hit = prediction != y.cpu() if targets is None else prediction == targets.cpu()
    known = torch.ones_like(hit)
    return Decision(hit, known, prediction, known, torch.zeros(len(x)))


def decide(
    clf: Classifier,
    x: Tensor,
    y: Tensor,
    targets: Tensor | None = None,
    index: Tensor | None = None,
    seed: int = 0,
) -> Decision:
    """Decides every sample of x (N, C, H, W) with labels y (N,).

    Args:
        index: (N,) identities that key a randomised model's draws; 0…N−1 if None.
    """
    if clf.randomised:
        return _majority(clf, x, y, targets, torch.arange(len(x)) if index is None else index, seed)
    parts = [clf.logits(part) for part in x.split(BATCH)]
    logits = torch.cat(parts) if parts else torch.zeros(0, 2, device=clf.device)
    y, targets = y.to(logits.device), None if targets is None else targets.to(logits.device)
    return Decision(misclassified(logits, y, targets), clear(logits, y, targets), *_predict(logits))


def _predict(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prediction, firmness and confidence of each row."""
    finite = logits.isfinite().all(1)
    logits = logits.nan_to_num(0.0)
    confidence, prediction = logits.softmax(1).max(1)
    return torch.where(finite, prediction, -1), ~finite | clear(logits, prediction), confidence * finite


def _majority(
    clf: Classifier, x: Tensor, y: Tensor, targets: Tensor | None, index: Tensor, seed: int
) -> Decision:
    rows = []
    for i in range(len(x)):
        with seeded(derive(seed, "decide", int(index[i])), clf.device):
            logits = clf.logits(x[i : i + 1].expand(DRAWS, *x.shape[1:]).contiguous())
        own = y[i : i + 1].to(logits.device).expand(DRAWS)
        goal = None if targets is None else targets[i : i + 1].to(logits.device).expand(DRAWS)
        votes = int(misclassified(logits, own, goal).sum())
        prediction, _, confidence = _predict(logits)
        common, firm = _commonest(prediction)
        rows.append((votes * 2 > DRAWS, abs(2 * votes - DRAWS) > 1, common, firm, float(confidence.mean())))
    kinds = (torch.bool, torch.bool, torch.long, torch.bool, torch.float32)
    columns = zip(*rows, strict=True) if rows else ([] for _ in kinds)
    return Decision(
        *(
            torch.tensor(column, dtype=kind, device=clf.device)
            for column, kind in zip(columns, kinds, strict=True)
        )
    )


def _commonest(predictions: Tensor) -> tuple[int, bool]:
    """The most frequent prediction, and whether it leads by more than one draw."""
    values, counts = predictions.unique(return_counts=True)
    leaders = counts.sort(descending=True)
    lead = int(leaders.values[0]) - (int(leaders.values[1]) if len(counts) > 1 else 0)
    return int(values[leaders.indices[0]]), lead > 1
