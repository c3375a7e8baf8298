"""What a certificate is: a promise about every point near a sample, with its conditions, by one model.

A certificate says for which model it holds, in which norm, and how sure it is; no attack has a part in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.errors import RobustError

Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Certificate:
    """A way to certify one classifier; its fields are the conditions, `records` does the work.

    Attributes:
        clf: the classifier.
        name: the registry's name.
        kind: ``"certificate"``, or ``"estimate"`` for a number that promises nothing.
        norms: those in which it has radii.
        guarantee: how sure it is, in one line.
    """

    clf: Classifier

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "certificate"
    norms: ClassVar[tuple[str, ...]] = ()
    guarantee: ClassVar[str] = ""

    def __post_init__(self) -> None:
        self.require(
            isinstance(self.clf, Classifier),
            f"certifies a Classifier, not {type(self.clf).__name__}; wrap the module first",
        )

    @property
    def norm(self) -> str:
        """The norm of the radii."""
        return self.norms[0]

    def certify(self, *x: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        """Classes (N,) int64 and radii (N,) float64 in the unit of x, one tensor (N, C, H, W) in the box."""
        raise NotImplementedError(f"{type(self).__name__} certifies nothing")

    def records(self, *x: Any, **settings: Any) -> list[Record]:
        """One record a sample, for JSON: ``class`` (-1 where it abstains), ``radius``, and what they rest on.

        Args:
            x: one tensor (N, C, H, W) in the box.
            settings: ``index``, (N,) the samples' identities, which key all randomness, by default 0…N−1; and the
                method's own, as `certify` takes them.
        """
        raise NotImplementedError(f"{type(self).__name__} certifies nothing")

    def conditions(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What the promise depends on, for JSON: norm, guarantee and the fields."""
        parameters = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "clf"}
        return {
            "method": self.name,
            "kind": self.kind,
            "norm": self.norm,
            "guarantee": self.guarantee,
            "parameters": parameters,
            "settings": dict(settings),
        }

    def require(self, holds: bool, what: str) -> None:
        """Raises one line, for a condition that makes no sense."""
        if not holds:
            raise RobustError(f"{self.name}: {what}")


def classes_and_radii(records: Sequence[Record]) -> tuple[Tensor, Tensor]:
    """What `Certificate.certify` gives, of its records: classes (N,) int64 and radii (N,) float64."""
    classes = torch.tensor([row["class"] for row in records], dtype=torch.int64)
    return classes, torch.tensor([row["radius"] for row in records], dtype=torch.float64)
