"""Single-step adversarial training, and how its collapse is noticed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.whitebox.pgd import PGD
from robust.classifier import Classifier
from robust.defenses.training.adversarial import AdversarialRecipe

OWN, PROBE = "own_step_accuracy", "pgd_probe_accuracy"
_STEPS = 10
_GAP = 0.2  # six standard errors of an accuracy on 256 samples


@dataclass(frozen=True, kw_only=True)
class SingleStepRecipe(AdversarialRecipe):
    """Adversarial training whose inner attack is one gradient step.

    Such a training may collapse within an epoch: the model learns to mislead the one step, and PGD finds what it hides
    (catastrophic overfitting, Wong et al. 2020, arXiv:2001.03994, section 5.4). So after every epoch the accuracy of
    256 training samples under the recipe's own step and under PGD-10 goes into the history, and a wide gap between
    them is a doubt.
    """

    probed: ClassVar[int] = 256

    def attack(self) -> Attack:
        """The single step."""
        raise NotImplementedError(f"{type(self).__name__} has no inner attack")

    def probe(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, seed: int) -> dict[str, float]:
        """Accuracy under the recipe's own step, and under PGD-10 at the same radius."""
        found = {}
        for name, attack in ((OWN, self.attack()), (PROBE, PGD(threat=self.threat, steps=_STEPS))):
            with clf.session():
                broken = attack.run(clf, x, y, seed=seed, index=index, precision="original").success
            found[name] = 1 - float(broken.double().mean())
        return found

    def doubts(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """One line about the first epoch that the own step leaves much more accuracy than PGD does."""
        for number, entry in enumerate(history):
            if not _hidden(entry):
                continue
            best = max((before.get(PROBE, 0.0) for before in history[:number]), default=0.0)
            was = f" (before it was up to {best:.1%})" if best >= max(_GAP, 2 * entry[PROBE]) else ""
            return [
                f"catastrophic overfitting in epoch {entry['epoch']:.0f}: accuracy is {entry[OWN]:.1%} under the "
                f"recipe's own step, but {entry[PROBE]:.1%} under PGD-{_STEPS}{was}; lower eps or the learning rate, "
                "use fast with alignment, or train with pgd-at"
            ]
        return []

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """The step, and the weights' gradient."""
        return 2.0


def _hidden(entry: Mapping[str, float]) -> bool:
    """Whether PGD breaks what the own step leaves: a wide gap, and two thirds of it or more."""
    own, probe = entry.get(OWN, 0.0), entry.get(PROBE, 0.0)
    return own - probe >= _GAP and probe <= own / 3
