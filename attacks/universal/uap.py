"""Universal adversarial perturbations (Moosavi-Dezfooli et al. 2017, arXiv:1610.08401)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust.attacks.trial import Trial, targets_of
from robust.attacks.universal.base import History, batches, scores_of
from robust.attacks.universal.perturbation import PerturbationAttack, perturbed, within
from robust.attacks.whitebox.deepfool import DeepFool
from robust.ball import column
from robust.classifier import misclassified
from robust.errors import RobustError
from robust.losses import get as get_loss
from robust.threat import L2


@dataclass(frozen=True, kw_only=True)
class UAP(PerturbationAttack):
    """Universal adversarial perturbation (Moosavi-Dezfooli et al. 2017, arXiv:1610.08401).

    One perturbation that changes the answers on most images. "gradient" is stochastic projected gradient ascent
    (Shafahi et al. 2020, arXiv:1811.11304), which is stronger at a fraction of the cost; "deepfool" is the paper's
    algorithm: where an image still stands under the perturbation, the smallest change that fools it is added, and the
    sum is projected. The paper takes one image at a time (`batch=1`); of more, all their changes are added at once.

    Departures: the labels given count, not the model's own answers; the number of steps is fixed, the rate is measured.

    Attributes:
        method: "gradient" or "deepfool".
        overshoot: of "deepfool": the factor beyond the boundary, less one.
    """

    method: Literal["gradient", "deepfool"] = "gradient"
    overshoot: float = 0.02

    def ascend(self, trial: Trial, history: History) -> Tensor:
        """See `PerturbationAttack.ascend`."""
        if self.method not in ("gradient", "deepfool"):
            raise RobustError(f"method={self.method!r} is unknown; use 'gradient' or 'deepfool'")
        return (
            super().ascend(trial, history) if self.method == "gradient" else self._accumulate(trial, history)
        )

    def _accumulate(self, trial: Trial, history: History) -> Tensor:
        """Algorithm 1 of the paper, over mini-batches."""
        largest = trial.threat.with_eps(trial.threat.radius)
        loss, delta = get_loss(self.loss), torch.zeros_like(trial.x[:1])
        for step, rows in batches(trial, self.batch, self.steps):
            points, free = perturbed(trial, rows, delta)
            scores = scores_of(trial, points)
            aimed = targets_of(trial.targets, rows)
            hit = misclassified(scores, trial.y[rows], aimed)
            history.add(step, loss(scores, trial.y[rows], aimed, scores), hit)
            if bool(hit.all()):
                continue
            standing = ~hit
            extra = self._smallest(trial, rows[standing], points[standing])
            delta = within(largest, delta + (extra * free[standing]).sum(0, keepdim=True), trial.bounds)
        return delta[0]

    def _smallest(self, trial: Trial, rows: Tensor, points: Tensor) -> Tensor:
        """The smallest changes, in l2, that fool the model on points; zero where none was found."""
        search = DeepFool(threat=L2(), overshoot=self.overshoot)
        inner = Trial(
            search,
            trial.model,
            points,
            trial.y[rows],
            targets=targets_of(trial.targets, rows),
            seed=trial.seed,
            index=trial.index[rows.cpu()],
        )
        search.attack(inner)
        return torch.where(column(inner.hit, points), inner.best - points, 0.0)
