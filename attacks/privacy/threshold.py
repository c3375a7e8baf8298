"""Thresholds on one number of the target's answer: loss, entropy, modified entropy, confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.privacy.base import MembershipAttack
from robust.attacks.privacy.signals import (
    log_probability,
    negative_entropy,
    negative_modified_entropy,
    scaled,
    top_log_odds,
)
from robust.errors import RobustError
from robust.membership import Evidence


@dataclass(frozen=True, kw_only=True)
class ThresholdAttack(MembershipAttack):
    """A number of each answer is the score.

    Attributes:
        thresholds: "one" for all; "class": each class its own, the best one between members and non-members of the
            reference models (Song & Mittal 2021), subtracted from the number.
    """

    thresholds: Literal["one", "class"] = "one"

    def __post_init__(self) -> None:
        if self.thresholds not in ("one", "class"):
            raise RobustError(f"thresholds={self.thresholds!r} is unknown; use 'one' or 'class'")

    def needs(self) -> int:
        """See `MembershipAttack.needs`."""
        return 1 if self.thresholds == "class" else 0

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """(N,) the number, higher for members."""
        raise TypeError(f"{type(self).__name__} does not say which number of an answer it takes")

    def score(self, evidence: Evidence) -> Tensor:
        """See `MembershipAttack.score`."""
        own = self.value(evidence.logits(), evidence.y)
        if self.thresholds == "one":
            return own
        inside = evidence.inside
        values = torch.stack(
            [self.value(evidence.reference_logits(k), evidence.y) for k in range(len(inside))]
        )
        return own - class_thresholds(values, inside, evidence.y)[evidence.y]


def class_thresholds(values: Tensor, inside: Tensor, y: Tensor) -> Tensor:
    """(classes,) each class's best threshold between members and non-members, by balanced accuracy.

    A class that lacks members or non-members takes the best one over all classes.

    Args:
        values: (K, N) numbers by reference model. inside: (K, N) bool. y: (N,) labels.
    """
    whole = best_threshold(values[inside], values[~inside])
    found = []
    for label in range(int(y.max()) + 1):
        of_class = (y == label).expand_as(inside)
        members, others = values[inside & of_class], values[~inside & of_class]
        found.append(best_threshold(members, others) if len(members) and len(others) else whole)
    return torch.tensor(found, dtype=torch.float64)


def best_threshold(members: Tensor, others: Tensor) -> float:
    """The value such that "at least so much" has the largest true- less false-positive rate; the largest of equals."""
    levels = torch.cat([members, others]).unique()
    caught = 1 - torch.searchsorted(members.sort().values, levels).double() / len(members)
    wrong = 1 - torch.searchsorted(others.sort().values, levels).double() / len(others)
    gain = caught - wrong
    return float(levels[gain == gain.max()].max())


@dataclass(frozen=True, kw_only=True)
class Loss(ThresholdAttack):
    """Loss threshold (Yeom et al. 2018, arXiv:1709.01604): the smaller the loss, the likelier a member."""

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """log p_y."""
        return log_probability(logits, y)


@dataclass(frozen=True, kw_only=True)
class Entropy(ThresholdAttack):
    """Prediction entropy (Salem et al. 2019, arXiv:1806.01246): members get certain answers; needs no label."""

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """Minus the entropy."""
        return negative_entropy(logits, y)


@dataclass(frozen=True, kw_only=True)
class ModifiedEntropy(ThresholdAttack):
    """Modified entropy (Song & Mittal 2021, arXiv:2003.10595): certain answers, and right ones; by class if asked."""

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """Minus the modified entropy."""
        return negative_modified_entropy(logits, y)


@dataclass(frozen=True, kw_only=True)
class Confidence(ThresholdAttack):
    """Confidence (Salem et al. 2019, arXiv:1806.01246): the largest posterior, or the label's.

    Attributes:
        of: "top": the largest posterior, for which no label is needed; "label": the label's (Song & Mittal 2021), which
            orders samples as the loss does unless each class has a threshold of its own.
    """

    choices: ClassVar[tuple[str, ...]] = ("top", "label")
    of: Literal["top", "label"] = "top"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in self.choices:
            raise RobustError(f"of={self.of!r} is unknown; use 'top' or 'label'")

    def value(self, logits: Tensor, y: Tensor) -> Tensor:
        """Log-odds of the posterior."""
        return top_log_odds(logits, y) if self.of == "top" else scaled(logits, y)
