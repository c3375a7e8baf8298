"""The black-box face of a model: scores or labels for points, counted, within a budget, with retries."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.cost import Cost
from robust.errors import BudgetExceeded, ModelError, RobustError, first_line

if TYPE_CHECKING:
    from robust.answers import AnswerLog

Answers = Literal["scores", "labels"]
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 30.0  # seconds before a call is tried again
_PATIENCE = 300.0  # the longest wait that the other side may ask for


class Unanswered(OSError):
    """A call without an answer.

    Args:
        reason: one line.
        spent: whether the points may have been processed all the same, so that sending them again costs again.
        wait: seconds that the other side asks for before the next try.
    """

    def __init__(self, reason: str, *, spent: bool, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.spent, self.wait = spent, wait


class Backend:
    """What stands behind an Oracle and is no Classifier: a callable that brings its own box and identity.

    Attributes:
        name: what reports call it; bounds: the box of its inputs; classes: how many, None if it does not say.
    """

    name: str = "backend"
    bounds: tuple[float, float] = (0.0, 1.0)
    classes: int | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """Scores (N, classes) or labels (N,) of x (N, C, H, W) in the box."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it answers")

    def digest(self) -> str:
        """The model's identity in a manifest, and for `resume`."""
        return f"oracle:{self.name}"

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it: JSON, and no secret."""
        return {}


class Remote(Backend):
    """A model elsewhere, whose answers are paid for: what was sent is not forgotten, and no answer is asked for twice.

    A subclass sends one batch once; the Oracle repeats, counts, and writes the answers down (`robust.answers`).
    """

    def __call__(self, x: Tensor) -> Tensor:
        """One answer outside an Oracle."""
        return self.send(x, uuid.uuid4().hex)

    def send(self, x: Tensor, key: str) -> Tensor:
        """The answer to one batch, asked for once.

        Args:
            key: names this batch, also when it is sent again; the other side may answer it from memory.

        Raises:
            Unanswered: there is no answer, but there may be one later.
            ModelError: the answer is none, and another try would not help.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how it sends")


class Oracle:
    """Answers of the original model, and nothing else of it.

    Of a `Remote` backend every point that may have been processed counts: a batch that is sent again because its
    answer was lost counts again.

    Args:
        backend: a `Classifier`, a `Backend`, or any callable from x (N, C, H, W) in the box to scores (N, classes) or
            labels (N,).
        answers: "scores" or "labels": what an attacker gets to see.
        budget: the most queries it will answer in all; None for no limit.
        bounds: the box, where the backend is no Classifier.
        classes: number of classes, where the backend only gives labels.
        batch: the most points sent at once.
        retries: how often a call that raises OSError is tried again, waiting twice as long each time.

    Attributes:
        cost: what was spent; repeated: how much of it on sending points again.
        log: where the answers of a `Remote` backend are kept while a run's group is under way.
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
        told = backend if isinstance(backend, (Classifier, Backend)) else None
        self.backend, self.answers, self.budget = backend, answers, budget
        self.bounds = told.bounds if told is not None else bounds
        self.device = backend.device if isinstance(backend, Classifier) else torch.device("cpu")
        self.name = name or (told.name if told is not None else str(getattr(backend, "__name__", "oracle")))
        self.batch, self.retries = batch, retries
        self._classes = backend.classes if classes is None and isinstance(backend, Backend) else classes
        self.cost, self.repeated = Cost(), 0
        self.log: AnswerLog | None = None
        self._ceiling, self._kept = float("inf"), 0  # of `limit`
        self._cut: tuple[Any, tuple[int, int]] = (
            None,
            (0, 0),
        )  # a run's group that ended in an error, its cost

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
    def remote(self) -> bool:
        """Whether the answers come from elsewhere and are paid for."""
        return isinstance(self.backend, Remote)

    @property
    def asked(self) -> int:
        """Points it was asked about: what was spent, without what was sent again."""
        return self.cost.queries - self.repeated

    @property
    def left(self) -> float:
        """Queries left in the budget; infinite without one."""
        return min(self._unspent, self._ceiling - self.asked)

    @property
    def _unspent(self) -> float:
        return float("inf") if self.budget is None else self.budget - self._kept - self.cost.queries

    @contextmanager
    def limit(self, queries: int, keep: int = 0) -> Iterator[None]:
        """At most so many further queries while open; the budget itself stays as it is.

        Args:
            keep: queries of the budget that even a batch that has to be sent again leaves untouched.
        """
        outer = self._ceiling, self._kept
        self._ceiling = self.asked + int(min(queries, self.left))
        self._kept += keep
        try:
            yield
        finally:
            self._ceiling, self._kept = outer

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
        if len(x):
            self._classes = answer.shape[1]
        return answer.float()

    def labels(self, x: Tensor) -> Tensor:
        """Predicted classes (N,) of x; NaN scores predict -1."""
        if self.answers == "scores":
            return _best(self.scores(x))
        answer = self._ask(x)
        if answer.dim() == 2 and len(x):
            self._classes = answer.shape[1]
        labels = _best(answer) if answer.dim() == 2 else answer.long()
        if self._classes is not None and len(x) and int(labels.max()) >= self._classes:
            raise ModelError(
                f"{self.name} answered the class {int(labels.max())}, but has {self._classes}; pass the right classes"
            )
        return labels

    def _ask(self, x: Tensor) -> Tensor:
        if len(x) > self.left:
            self._refuse(len(x), self.left)
        parts = x.detach().split(self.batch)
        if isinstance(self.backend, Remote):
            if not len(x):
                return torch.zeros(0, self._classes or 0) if self.answers == "scores" else torch.zeros(0)
            return torch.cat([self._send(self.backend, part) for part in parts])
        self.cost.queries += len(x)
        return torch.cat([self._call(self.backend, part) for part in parts])

    def _refuse(self, asked: int, left: float) -> None:
        budget = self.asked + int(self.left) if self.budget is None else self.budget
        raise BudgetExceeded(
            f"the query budget of {budget} is spent: {asked} asked, {max(int(left), 0)} left"
        )

    def _call(self, backend: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        for attempt in range(self.retries + 1):
            try:
                with torch.no_grad():
                    answer = torch.as_tensor(backend(x))
                break
            except OSError as error:
                self._wait(attempt, error)
        return self._checked(answer, len(x))

    def _send(self, backend: Remote, x: Tensor) -> Tensor:
        """The answer of a batch from the log, or else from the backend; every sending is booked before it happens."""
        past = None if self.log is None else self.log.recall(x)
        if past is None:
            self.settle()
        key = uuid.uuid4().hex if past is None else past.key
        if past is not None:
            again = past.sends - (past.answer is not None)
            self.cost.queries += past.sends * len(x)
            self.repeated += again * len(x)
            if past.answer is not None:
                return past.answer
        for attempt in range(self.retries + 1):
            if len(x) > self._unspent:
                self._refuse(len(x), self._unspent)
            if self.log is not None:
                self.log.intend(key, x)
            self.cost.queries += len(x)
            try:
                answer = self._checked(backend.send(x, key).cpu(), len(x))
                break
            except OSError as error:
                if not getattr(error, "spent", True):
                    self.cost.queries -= len(x)
                    if self.log is not None:
                        self.log.void(key)
                else:
                    self.repeated += len(x)
                self._wait(attempt, error)
        if self.log is not None:
            self.log.answer(key, answer)
        return answer

    @contextmanager
    def group(self, name: str, committed: Container[str]) -> Iterator[list[int]]:
        """Opens the log, if there is one, for a group of a run; see `AnswerLog.begin`.

        Yields:
            A list that holds, at the end, what the group spent, and how much of it on sending points again.
        """
        log, found = self.log, [0, 0]
        spent, repeated = self.cost.queries, self.repeated
        if log is not None:
            place, before = self._cut
            if place == (log.path, name):  # this very oracle was cut off in it, and the log counts that anew
                self.cost.queries, self.repeated = spent - before[0], repeated - before[1]
                spent, repeated = self.cost.queries, self.repeated
            self._lose(log.begin(name, committed))
        try:
            yield found
            self.settle()
        except BaseException:
            if log is not None:
                self._cut = (log.path, name), (self.cost.queries - spent, self.repeated - repeated)
            raise
        self._cut = None, (0, 0)
        found[:] = self.cost.queries - spent, self.repeated - repeated

    def settle(self) -> None:
        """Counts what the log holds and was not asked again, as in a run that goes on with other points."""
        if self.log is not None:
            self._lose(self.log.settle())

    def _lose(self, points: int) -> None:
        self.cost.queries += points
        self.repeated += points

    def _wait(self, attempt: int, error: OSError) -> None:
        """Waits before the next try, as long as the other side asks for; raises where there is none."""
        asked = float(getattr(error, "wait", 0.0))
        if attempt == self.retries or asked > _PATIENCE:
            tries = f"after {attempt + 1} tries" if attempt else "at the first try"
            raise ModelError(f"{self.name} did not answer {tries}: {first_line(error)}") from error
        time.sleep(max(min(_FIRST_WAIT * 2**attempt, _LONGEST_WAIT), asked))

    def _checked(self, answer: Tensor, count: int) -> Tensor:
        if answer.dim() not in (1, 2) or len(answer) != count:
            raise ModelError(
                f"{self.name} answered {tuple(answer.shape)} to {count} points; one row each is right"
            )
        return answer


def _best(scores: Tensor) -> Tensor:
    return torch.where(scores.isfinite().all(1), scores.argmax(1), -1)


@contextmanager
def counted(model: Classifier | Oracle) -> Iterator[Cost]:
    """A cost that is filled in at the end: what the model was asked for in between, and the time."""
    cost, begun, before = Cost(), time.perf_counter(), spent_on(model)
    yield cost
    spent = spent_on(model) - before
    cost.forwards, cost.backwards, cost.queries = spent.forwards, spent.backwards, spent.queries
    cost.seconds = time.perf_counter() - begun


def spent_on(model: Classifier | Oracle) -> Cost:
    """The counts so far; forwards are those of the classifier behind an oracle."""
    spent = model.cost + Cost()
    if isinstance(model, Oracle) and isinstance(model.backend, Classifier):
        spent.forwards = model.backend.cost.forwards
    return spent
