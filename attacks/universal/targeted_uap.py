"""Targeted universal perturbations by iterated gradient steps (Hirano & Takemoto 2020, arXiv:1911.06502)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from robust.attacks.trial import Trial
from robust.attacks.universal.base import easiest
from robust.attacks.universal.perturbation import Perturbation, PerturbationAttack


@dataclass(frozen=True, kw_only=True)
class TargetedUAP(PerturbationAttack):
    """Targeted universal perturbation (Hirano & Takemoto 2020, arXiv:1911.06502): most images to one class.

    The paper steps along one image's gradient towards the target (its sign in linf, its direction in l2), projects, and
    goes on to the next image; `batch=1, momentum=0` does that, with steps that fall. The defaults average over
    mini-batches. Without targets the class is the one that is the likeliest wrong class of the most samples.
    """

    def learn(self, trial: Trial) -> Perturbation:
        """See `UniversalAttack.learn`."""
        if trial.targets is not None:
            return super().learn(trial)
        # What counts as success stays what it was, a wrong answer; only the search is aimed.
        trial.targets = torch.full_like(trial.y, easiest(trial))
        try:
            return super().learn(trial)
        finally:
            trial.targets = None
