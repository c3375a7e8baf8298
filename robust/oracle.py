"""The black-box face of a model: scores or labels for points, counted, within a budget, with retries."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.cost import Cost
from robust.errors import BudgetExceeded, ModelError, RobustError, first_line

Answers = Literal["scores", "labels"]


class Oracle:
    """Answers of the original model, and nothing else of it.

    Args:
        backend: a `Classifier`, or any callable from x (N, C, H, W) in the box to scores (N, classes) or labels (N,).
        answers: "scores" or "labels": what an attacker gets to see.
        budget: the most queries it will answer in all; None for no limit.
        bounds: the box, where the backend is no Classifier.
        classes: number of classes, where the backend only gives labels.
        batch: the most points sent at once.
        retries: how often a call that raises OSError is tried again, waiting twice as long each time.
    """

    def __init__(
        self,
        backend: Classifier | Callable[[Tensor], Tensor],
        *,
        answers: Answers = "scores",
        budget: int | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
        classes: int | None = None,
        batch: int = 256,
        retries: int = 2,
        name: str | None = None,
    ) -> None:
        if answers not in ("scores", "labels"):
            raise RobustError(f"answers={answers!r} is unknown; an oracle gives 'scores' or 'labels'")
        if budget is not None and budget < 1:
            raise RobustError(f"budget={budget} allows no query; give a positive number")
        if batch < 1 or retries < 0:
            raise RobustError(f"batch={batch} and retries={retries} must be at least 1 and 0")
        self.backend, self.answers, self.budget = backend, answers, budget
        self.bounds = backend.bounds if isinstance(backend, Classifier) else bounds
        self.device = backend.device if isinstance(backend, Classifier) else torch.device("cpu")
        self.name = name or (
            backend.name if isinstance(backend, Classifier) else getattr(backend, "__name__", "oracle")
        )
        self.batch, self.retries = batch, retries
        self._classes = classes
        self.cost = Cost()

    @property
    def classes(self) -> int:
        """Number of classes, known after the first answer with scores."""
        if self._classes is None:
            raise ModelError("the oracle's number of classes is unknown; pass classes=")
        return self._classes

    @property
    def known_classes(self) -> int | None:
        """`classes`, or None before the first answer with scores."""
        return self._classes

    @property
    def left(self) -> float:
        """Queries left in the budget; infinite without one."""
        return float("inf") if self.budget is None else self.budget - self.cost.queries

    @contextmanager
    def limit(self, queries: int) -> Iterator[None]:
        """At most so many further queries while open; the budget itself stays as it is."""
        whole = self.budget
        self.budget = self.cost.queries + int(min(queries, self.left))
        try:
            yield
        finally:
            self.budget = whole

    def scores(self, x: Tensor) -> Tensor:
        """Scores (N, classes) of x, counted before they are asked for.

        Raises:
            BudgetExceeded: fewer queries are left than x has points; none is spent.
        """
        if self.answers == "labels":
            raise RobustError(f"{self.name} gives labels only; use an attack that needs no scores")
        answer = self._ask(x)
        if answer.dim() != 2:
            raise ModelError(f"{self.name} returned {tuple(answer.shape)}; scores are (N, classes)")
        self._classes = answer.shape[1]
        return answer.float()

    def labels(self, x: Tensor) -> Tensor:
        """Predicted classes (N,) of x; NaN scores predict -1."""
        if self.answers == "scores":
            return _best(self.scores(x))
        answer = self._ask(x)
        return _best(answer) if answer.dim() == 2 else answer.long()

    def _ask(self, x: Tensor) -> Tensor:
        if len(x) > self.left:
            raise BudgetExceeded(
                f"the query budget of {self.budget} is spent: {len(x)} asked, {int(self.left)} left"
            )
        self.cost.queries += len(x)
        return torch.cat([self._call(part) for part in x.detach().split(self.batch)])

    def _call(self, x: Tensor) -> Tensor:
        for attempt in range(self.retries + 1):
            try:
                with torch.no_grad():
                    answer = torch.as_tensor(self.backend(x))
                break
            except OSError as error:
                if attempt == self.retries:
                    tries = f"after {attempt + 1} tries"
                    raise ModelError(f"{self.name} did not answer {tries}: {first_line(error)}") from error
                time.sleep(0.1 * 2**attempt)
        if answer.dim() not in (1, 2) or len(answer) != len(x):
            raise ModelError(
                f"{self.name} answered {tuple(answer.shape)} to {len(x)} points; one row each is right"
            )
        return answer


def _best(scores: Tensor) -> Tensor:
    return torch.where(scores.isfinite().all(1), scores.argmax(1), -1)
