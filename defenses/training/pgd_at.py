"""Adversarial training with projected gradient descent (Madry et al. 2018, arXiv:1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass

from robust.defenses.training.adversarial import IteratedRecipe


@dataclass(frozen=True, kw_only=True)
class PGDAT(IteratedRecipe):
    """PGD adversarial training: the loss of the strongest point PGD finds (Madry et al. 2018, arXiv:1706.06083).

    One step solves the inner maximum of ``min_w E max_{|d| <= eps} L(w, x + d, y)`` (their eq. 2.1) by PGD from a
    random start, and descends on its outer minimum (their Danskin argument, section 3). The inner attack sees the
    model in evaluation mode with frozen weights, the outer loss sees it in training mode.

    It promises nothing by itself: robustness is what `robust eval` measures afterwards.
    """
