"""Doubts: reasons not to take a robust accuracy at its word, each one line in the verdict.

After AutoAttack's checks and the indicators of attack failure of Pintor et al. 2022 (arXiv:2106.09947).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class StageFacts:
    """What one attack of the suite saw, summed over the chunks.

    Attributes:
        attempted, broken: samples; notes: the engine's counts by name.
    """

    attack: str
    knowledge: str
    attempted: int = 0
    broken: int = 0
    notes: dict[str, float] = field(default_factory=dict)

    def share(self, part: str, whole: str) -> float | None:
        """notes[part] / notes[whole], or None where nothing was counted."""
        total = self.notes.get(whole, 0.0)
        return self.notes.get(part, 0.0) / total if total else None


def raise_doubts(
    *,
    n: int,
    correct: int,
    robust: int,
    classes: int,
    undefined: int,
    marginal: int,
    width: float,
    norm: str,
    eps: float,
    randomised: bool,
    suite: str,
    stages: Sequence[StageFacts],
    averaged: bool = False,
    unaware: int = 0,
) -> list[str]:
    """All doubts about a finished run, the gravest first.

    Args:
        n, correct, robust, marginal: numbers of samples; undefined: of clean ones that the model answers with NaN.
        width: the box's width; eps: the largest radius.
        averaged: whether an attack of the suite averages its gradients over a randomised model's draws.
        unaware: samples that fell only to attacks that do not know of the model's defence.
    """
    found = [
        *_model(n, correct, classes, undefined),
        *_randomness(randomised and not averaged, suite),
        *_masking(stages, correct),
        *_whole_box(norm, eps, width, robust, n, classes),
    ]
    if unaware:
        found.append(
            f"{unaware} samples fell only to attacks that do not know of the defence: is its declared gradient right?"
        )
    if classes < 4 and any(stage.attack == "apgd-t" for stage in stages):
        found.append(
            f"{classes} classes: the targeted DLR is not defined below 4, apgd-t raised z_t − z_y instead"
        )
    if marginal:
        found.append(
            f"{marginal} outcomes are within float noise (marginal): other hardware may see them differently"
        )
    if n < 100:
        found.append(f"only {n} samples: read the robust accuracy with its confidence interval")
    return found


def _model(n: int, correct: int, classes: int, undefined: int) -> list[str]:
    found = []
    chance = 1 / max(classes, 1)
    # Few samples cannot tell from chance; an accuracy in the upper half of what is possible above it is no doubt.
    if n and correct / n <= min(chance + 2 * math.sqrt(chance * (1 - chance) / n), (1 + chance) / 2):
        found.append(
            f"clean accuracy {correct / n:.1%} is at chance for {classes} classes: "
            "wrong normalisation, label order or weights?"
        )
    if undefined:
        found.append(
            f"NaN or infinite logits on {undefined} of {n} clean samples, which count as misclassified"
        )
    return found


def _randomness(randomised: bool, suite: str) -> list[str]:
    if randomised and suite != "rand":
        return [f"the model is randomised, but suite {suite} does not average its gradients: use suite rand"]
    return []


def _masking(stages: Sequence[StageFacts], correct: int) -> list[str]:
    found = []
    for stage in stages:
        zero = stage.share("zero_gradients", "gradients")
        if zero is not None and zero > 0.05:
            found.append(
                f"gradients vanish at {zero:.0%} of the points {stage.attack} looked at: a masked gradient?"
            )
        risen = stage.share("risen", "searches")
        if risen is not None and risen < 0.5 and stage.knowledge == "white":
            found.append(
                f"the loss rose in only {risen:.0%} of {stage.attack}'s searches: they may have failed"
            )
        if stage.notes.get("budget_spent"):
            found.append(
                f"the query budget was spent before {stage.attack} ended: more queries may break more samples"
            )
        used = stage.share("budget_used", "budget_rows")
        if used is not None and used < 0.5:
            found.append(
                f"{stage.attack}'s strongest points use only {used:.0%} of eps: the search may have stalled"
            )
    white = any(stage.knowledge == "white" for stage in stages)
    for stage in stages:
        if white and stage.knowledge != "white" and stage.broken > max(2, 0.01 * correct):
            how = "with other models' gradients" if stage.knowledge == "transfer" else "without gradients"
            found.append(
                f"{stage.attack}, {how}, broke {stage.broken} samples that gradient attacks could not: "
                "often a sign of gradient masking"
            )
    return found


def _whole_box(norm: str, eps: float, width: float, robust: int, n: int, classes: int) -> list[str]:
    if norm != "linf" or eps < width / 2 or not n:
        return []
    chance = 1 / max(classes, 1)
    if robust / n > chance + 3 * math.sqrt(chance * (1 - chance) / n):
        return [
            f"eps={eps:g} reaches mid-grey from every image, and still {robust} of {n} samples survive: "
            "the attacks fail"
        ]
    return []
