"""The one place where a point is declared misclassified: the original model, in float32, eager, unfolded.

`evaluate`, `verify` and the attacks' last word all use `decide`, so that they cannot disagree. For a randomised model
the outcome is the majority over keyed draws, which belong to the sample and not to the batch it shares.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.classifier import Classifier, clear, misclassified
from robust.rng import derive

DRAWS = 25
_BATCH = 64


@dataclass(frozen=True)
class Decision:
    """Outcome per sample.

    Attributes:
        hit: (N,) bool: misclassified, or at the target.
        sure: (N,) bool: the outcome is outside float noise.
        prediction: (N,) predicted class, -1 for NaN; of a randomised model the most frequent one.
        confidence: (N,) softmax probability of the prediction.
    """

    hit: Tensor
    sure: Tensor
    prediction: Tensor
    confidence: Tensor


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
    parts = [clf.logits(part) for part in x.split(_BATCH)]
    logits = torch.cat(parts) if parts else torch.zeros(0, 2, device=clf.device)
    y = y.to(logits.device)
    prediction, confidence = _predict(logits)
    return Decision(misclassified(logits, y, targets), clear(logits, y, targets), prediction, confidence)


def _predict(logits: Tensor) -> tuple[Tensor, Tensor]:
    finite = logits.isfinite().all(1)
    confidence, prediction = logits.nan_to_num(0.0).softmax(1).max(1)
    return torch.where(finite, prediction, -1), torch.where(finite, confidence, 0.0)


def _majority(
    clf: Classifier, x: Tensor, y: Tensor, targets: Tensor | None, index: Tensor, seed: int
) -> Decision:
    rows = []
    for i in range(len(x)):
        with torch.random.fork_rng():
            torch.manual_seed(derive(seed, "decide", int(index[i])))
            logits = clf.logits(x[i : i + 1].expand(DRAWS, *x.shape[1:]).contiguous())
        own = y[i : i + 1].to(logits.device).expand(DRAWS)
        goal = None if targets is None else targets[i : i + 1].to(logits.device).expand(DRAWS)
        votes = int(misclassified(logits, own, goal).sum())
        prediction, confidence = _predict(logits)
        common = prediction.mode().values
        rows.append((votes * 2 > DRAWS, abs(2 * votes - DRAWS) > 1, int(common), float(confidence.mean())))
    hit, sure, prediction_, confidence_ = zip(*rows, strict=True) if rows else ((), (), (), ())
    device = clf.device
    return Decision(
        torch.tensor(hit, dtype=torch.bool, device=device),
        torch.tensor(sure, dtype=torch.bool, device=device),
        torch.tensor(prediction_, dtype=torch.long, device=device),
        torch.tensor(confidence_, device=device),
    )
