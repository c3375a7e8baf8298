"""What every membership attack is: a frozen dataclass of hyper-parameters that scores samples, higher for members."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.errors import RobustError
from robust.membership import VIEWS, Evidence, References, require_balance
from robust.oracle import Oracle


@dataclass(frozen=True, kw_only=True)
class MembershipAttack:
    """The base of all membership attacks; a subclass says how it scores.

    A score depends on the sample, the models and, where a method pools over samples (a variance, a threshold, a
    population), on the set of samples; never on their order.
    """

    kind: ClassVar[str] = "membership"
    sees: ClassVar[Literal["scores", "labels"]] = "scores"

    def __call__(
        self,
        target: Classifier | Oracle,
        x: Tensor,
        y: Tensor,
        *,
        references: References | None = None,
        population: tuple[Tensor, Tensor] | None = None,
        seed: int = 0,
        index: Tensor | None = None,
    ) -> Tensor:
        """(N,) float64 scores; the higher, the likelier is a sample among those that `target` was trained on.

        Args:
            target: the model in question.
            x: (N, C, H, W) samples in its box. y: (N,) their labels.
            references: the attacker's own models, with the samples that each was trained on.
            population: (x, y) of further samples.
            seed: with `index` (N,), the samples' identities, the key of all randomness.

        Raises:
            RobustError: too few reference models, or answers that the attack cannot use, in one line.
        """
        return self.run(Evidence(target, x, y, references, population, seed, index))

    def run(self, evidence: Evidence) -> Tensor:
        """The scores for evidence that several attacks share, see `__call__`."""
        target = evidence.target
        if self.sees == "scores" and isinstance(target, Oracle) and target.answers == "labels":
            raise RobustError(
                f"{self.name} needs scores, and {target.name} gives labels; use a label-only attack"
            )
        have, need = len(evidence.inside), self.needs()
        if have < need:
            raise RobustError(
                f"{self.name} needs {need} reference models, and there are {have}; give more (--shadow)"
            )
        scores = self.score(evidence).double().cpu()
        if bool(scores.isnan().any()):
            raise RobustError(f"{self.name} has no number for sample {int(scores.isnan().nonzero()[0])}")
        return scores

    @property
    def name(self) -> str:
        """The name in the registry."""
        from robust.attacks.privacy import REGISTRY

        own = f"{type(self).__module__}:{type(self).__qualname__}"
        return next((name for name, path in REGISTRY.items() if path == own), type(self).__name__)

    def needs(self) -> int:
        """The fewest reference models that it works with."""
        return 0

    def score(self, evidence: Evidence) -> Tensor:
        """(N,) the scores; `run` has checked what the attack needs."""
        raise TypeError(f"{type(self).__name__} is no complete attack: it does not say how it scores")

    def config(self) -> dict[str, Any]:
        """The hyper-parameters by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, kw_only=True)
class ReferenceAttack(MembershipAttack):
    """An attack that compares the target with reference models.

    Attributes:
        references: how many of them it takes, the first ones; None for all.
    """

    fewest: ClassVar[int] = 2
    references: int | None = None

    def __post_init__(self) -> None:
        if self.references is not None and self.references < self.fewest:
            raise RobustError(
                f"references={self.references} is too few for {self.name}; give at least {self.fewest}"
            )

    def needs(self) -> int:
        """See `MembershipAttack.needs`."""
        return self.fewest if self.references is None else self.references

    def inside(self, evidence: Evidence, both: bool) -> Tensor:
        """(K, N) bool of the models it takes; every sample is out of some, and, if `both` are needed, in some.

        Raises:
            RobustError: it is not, in one line.
        """
        inside = evidence.inside[: self.references]
        require_balance(inside, self.name, both)
        return inside

    def values(self, evidence: Evidence, value: Callable[[Tensor, Tensor], Tensor], query: int = 0) -> Tensor:
        """(K, N) what `value` makes of each reference model's logits and the labels."""
        count = len(evidence.inside[: self.references])
        return torch.stack([value(evidence.reference_logits(k, query), evidence.y) for k in range(count)])


def require_queries(queries: int) -> None:
    """Raises one line unless there are so many views of a sample."""
    if not 1 <= queries <= len(VIEWS):
        raise RobustError(f"queries={queries}: a sample is asked about in 1 to {len(VIEWS)} views")
