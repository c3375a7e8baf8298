"""A learned attack: one model on posteriors, loss, entropies and correctness, taught by reference models in and out."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.privacy.base import ReferenceAttack
from robust.attacks.privacy.features import everything, lessons, standardised
from robust.errors import RobustError
from robust.membership import Evidence
from robust.rng import derive

LEARNERS = ("mlp", "logistic", "forest", "knn")


@dataclass(frozen=True, kw_only=True)
class Learned(ReferenceAttack):
    """A learned attack (Salem et al. 2019, arXiv:1806.01246): a small net on posteriors, loss and entropies.

    Attributes:
        learner: "mlp" (64 hidden units), "logistic", "forest" (200 trees) or "knn" (50 neighbours), of scikit-learn.
        samples: rows to learn from, at most.
    """

    fewest: ClassVar[int] = 1
    learner: Literal["mlp", "logistic", "forest", "knn"] = "mlp"
    samples: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learner not in LEARNERS or self.samples < 1:
            raise RobustError(
                f"learner={self.learner!r}, samples={self.samples}: one of {', '.join(LEARNERS)}, and at least 1"
            )

    def score(self, evidence: Evidence) -> Tensor:
        """The learner's log-odds of "in"."""
        x, _, was_in = lessons(evidence, self.references, everything, self.samples)
        if not 0 < int(was_in.sum()) < len(was_in):
            raise RobustError("learned: all reference models saw all samples, or none; give them halves")
        model = self._model(derive(evidence.seed, "learned") % 2**32, len(x))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an attack model that has not converged is an attack model still
            model.fit(standardised(x, x).numpy(), was_in.numpy())
        own = standardised(everything(evidence.logits(), evidence.y), x)
        chance = torch.from_numpy(model.predict_proba(own.numpy())[:, 1]).double().clamp(1e-12, 1 - 1e-12)
        return chance.logit()

    def _model(self, seed: int, rows: int) -> Any:
        if self.learner == "mlp":
            from sklearn.neural_network import MLPClassifier

            return MLPClassifier((64,), early_stopping=rows >= 1000, max_iter=200, random_state=seed)
        if self.learner == "logistic":
            from sklearn.linear_model import LogisticRegression

            return LogisticRegression(max_iter=1000)
        if self.learner == "forest":
            from sklearn.ensemble import RandomForestClassifier

            return RandomForestClassifier(200, min_samples_leaf=5, random_state=seed)
        from sklearn.neighbors import KNeighborsClassifier

        return KNeighborsClassifier(min(50, rows))
