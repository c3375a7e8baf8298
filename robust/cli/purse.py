"""What `robust attack` may ask a model that gives answers only, and what it has asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from robust.classifier import Classifier
from robust.cost import Cost
from robust.errors import ConfigError
from robust.oracle import Oracle

if TYPE_CHECKING:
    from torch import Tensor

    from robust.decide import Decision


class Purse:
    """A model whose passes are not counted as queries: it may be asked anything."""

    def __init__(self, model: Classifier | Oracle) -> None:
        self.model = model
        self.warnings: list[str] = []

    @contextmanager
    def share(self, live: int, later: int) -> Iterator[None]:
        """While open, an attack on `live` samples may ask, with `later` samples to come."""
        yield

    def note(self, notes: Mapping[str, float]) -> None:
        """Takes over what an attack noted."""

    def confirmed(self, success: Tensor, after: Decision, targets: Tensor | None) -> Tensor:
        """(N,) bool: the successes that the last look at the points confirms."""
        return success

    def whole(self, cost: Cost) -> Cost:
        """The attack's cost with all that was asked beside it."""
        return cost

    def facts(self, cost: Cost) -> dict[str, Any] | None:
        """What the summary says of an oracle that was asked by an attack of this cost."""
        return None

    def doubts(self) -> list[str]:
        """The summary's warnings."""
        return [*getattr(self.model, "warnings", ()), *self.warnings]


class OraclePurse(Purse):
    """A model that gives answers only: every one counts, and a budget is divided among the samples.

    Args:
        oracle: the model; total: samples in all.
        aimed: whether examples of the classes are looked for first; first: queries that the attack learns from.
    """

    def __init__(self, oracle: Oracle, total: int, aimed: bool, first: int = 0) -> None:
        super().__init__(oracle)
        self.oracle, self.before, self.again = oracle, oracle.cost.queries, oracle.repeated
        least = first + (5 if aimed else 4) * total
        if oracle.left < least:
            raise ConfigError(
                f"--budget: {int(oracle.left)} queries are too few to attack {total} samples; give at least {least}"
            )

    @contextmanager
    def share(self, live: int, later: int) -> Iterator[None]:
        """An equal part for every sample; kept are two looks at each: at the clean point, and at the attacked one."""
        if self.oracle.budget is None:
            yield
            return
        kept = 2 * (live + later)
        part = int((self.oracle.left - kept) * live / (live + later))
        with self.oracle.limit(part, kept):
            yield

    def note(self, notes: Mapping[str, float]) -> None:
        """An attack that ran out of queries is a doubt."""
        line = "the query budget was spent before the attack ended: more queries may break more samples"
        if notes.get("budget_spent") and line not in self.warnings:
            self.warnings.append(line)

    def confirmed(self, success: Tensor, after: Decision, targets: Tensor | None) -> Tensor:
        """What the oracle still says of the point."""
        said = after.prediction.cpu()
        return success & (after.hit.cpu() if targets is None else said == targets.cpu())

    def whole(self, cost: Cost) -> Cost:
        """Every query: the attack's, the looks before and after it, and what was sent twice."""
        spent = self.oracle.cost.queries - self.before
        return Cost(cost.forwards, cost.backwards, spent, cost.seconds)

    def facts(self, cost: Cost) -> dict[str, Any] | None:
        """Kind of answers, budget, queries of the attack alone, and those sent again."""
        told = {"answers": self.oracle.answers, "budget": self.oracle.budget}
        return {**told, "attack_queries": cost.queries, "repeated": self._repeated}

    def doubts(self) -> list[str]:
        """A spent budget, and queries that count twice."""
        line = f"{self._repeated} queries were sent again, since their answers were lost; they count twice"
        return [*self.warnings, *([line] if self._repeated else [])]

    @property
    def _repeated(self) -> int:
        return self.oracle.repeated - self.again


def purse_of(model: Classifier | Oracle, total: int, aimed: bool, first: int = 0) -> Purse:
    """The purse that fits the model; see `OraclePurse`."""
    return OraclePurse(model, total, aimed, first) if isinstance(model, Oracle) else Purse(model)
