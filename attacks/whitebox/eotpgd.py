"""PGD on the expectation over a randomised model (Athalye et al. 2018, arXiv:1802.00420)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from robust.attacks.trial import Trial
from robust.attacks.whitebox.pgd import PGD
from robust.classifier import Classifier
from robust.errors import RobustError


@dataclass(frozen=True, kw_only=True)
class EOTPGD(PGD):
    """EOT-PGD (Athalye et al. 2018, arXiv:1802.00420): each gradient averaged over a randomised model's forwards.

    For stochastic networks also Zimmermann 2019 (arXiv:1907.00895). A model that is not randomised says the same in
    every forward, so it is asked once, and this is `pgd`.

    Attributes:
        copies: forwards each gradient is averaged over, 10 as the paper takes against pruned activations.
    """

    copies: int = 10

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.copies < 1:
            raise RobustError(f"copies={self.copies} averages nothing; give at least 1")
        once = isinstance(trial.model, Classifier) and not trial.model.randomised
        PGD.attack(replace(self, copies=1) if once else self, trial)
