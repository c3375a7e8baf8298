"""Shadow models: for each class a net that learns from them how answers on members differ (Shokri et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from robust.attacks.privacy.base import ReferenceAttack
from robust.attacks.privacy.features import lessons, posteriors, standardised
from robust.errors import RobustError
from robust.membership import Evidence
from robust.rng import derive
from robust.stacked import first_states, fit_stacked


@dataclass(frozen=True, kw_only=True)
class Shadow(ReferenceAttack):
    """Shadow models (Shokri et al. 2017, arXiv:1610.05820): a net for each class on the posteriors of in and out.

    The nets see the sorted log-odds, where the paper's see the posteriors; all are trained together (`robust.stacked`).
    A class that reference models saw too little of takes a net that is trained on all classes.

    Attributes:
        hidden: units of a net's one hidden layer. epochs: passes over a class's rows. lr: of Adam.
        samples: rows to learn from, at most, over all classes.
    """

    fewest: ClassVar[int] = 1
    hidden: int = 64
    epochs: int = 30
    lr: float = 3e-3
    samples: int = 20_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.hidden, self.epochs, self.samples) < 1 or not self.lr > 0:
            raise RobustError(
                f"hidden={self.hidden}, epochs={self.epochs}, samples={self.samples} and lr={self.lr} must be positive"
            )

    def score(self, evidence: Evidence) -> Tensor:
        """The log-odds of "in" by the net of the sample's class."""
        x, y, was_in = lessons(evidence, self.references, posteriors, self.samples)
        labels = evidence.y.unique().tolist()
        rows = [(y == label).nonzero()[:, 0] for label in labels]
        taught = [k for k, part in enumerate(rows) if 0 < int(was_in[part].sum()) < len(part)]
        everyone = torch.arange(len(x))
        width = x.shape[1]

        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(width, self.hidden), nn.ReLU(), nn.Linear(self.hidden, 2))

        seed = derive(evidence.seed, "shadow")
        nets = fit_stacked(
            build(), (standardised(x, x), was_in.long()), [everyone, *(rows[k] for k in taught)],
            first=first_states(build, seed), keys=[0, *(labels[k] + 1 for k in taught)], epochs=self.epochs,
            batch_size=64, lr=self.lr, seed=seed,
        )  # fmt: skip
        own = standardised(posteriors(evidence.logits(), evidence.y), x)
        place = {labels[k]: 1 + i for i, k in enumerate(taught)}
        scores = torch.empty(len(own), dtype=torch.float64)
        for label in labels:
            of_class = evidence.y == label
            module = nets.classifier(place.get(label, 0)).module
            with torch.no_grad():
                out, within = module(own[of_class]).double().unbind(1)
            scores[of_class] = within - out
        return scores
