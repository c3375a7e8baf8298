"""The black-box face: what it answers, what it counts, its budget, batches, retries, and errors of one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.errors import BudgetExceeded, ModelError, RobustError
from robust.oracle import Oracle

SCORES = torch.tensor([[0.1, 0.9, 0.0], [0.5, 0.2, 0.3], [torch.nan, 1.0, 0.0], [0.0, torch.inf, 0.0]])


class Backend:
    """A callable that notes what it is sent; its scores are the first three numbers of every point."""

    def __init__(self, failures: int = 0, error: type[Exception] = ConnectionError) -> None:
        self.sent: list[int] = []
        self.failures, self.error = failures, error
        self.gradients = False

    def __call__(self, x: Tensor) -> Tensor:
        """Scores, after the failures that were asked for."""
        self.sent.append(len(x))
        self.gradients |= torch.is_grad_enabled()
        if self.failures:
            self.failures -= 1
            raise self.error("the line is busy\nnow")
        return x.flatten(1)[:, :3]


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long it waited, without waiting."""
    found: list[float] = []
    monkeypatch.setattr("robust.oracle.time.sleep", found.append)
    return found


def always(answer: Any) -> Callable[[Tensor], Any]:
    """A backend that answers one thing."""
    return lambda x: answer


def points(n: int) -> Tensor:
    """n points of the box."""
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(0))


def test_scores_are_the_backend_s_in_batches_and_in_order() -> None:
    backend = Backend()
    oracle = Oracle(backend, batch=4)
    x = points(10).requires_grad_()
    torch.testing.assert_close(oracle.scores(x), x.detach().flatten(1)[:, :3])
    assert backend.sent == [4, 4, 2]
    assert not backend.gradients
    assert not oracle.scores(x).requires_grad
    assert (oracle.classes, oracle.known_classes) == (3, 3)
    assert oracle.cost.queries == 20


def test_labels_are_the_best_scores_and_nan_predicts_nothing() -> None:
    for oracle in (Oracle(always(SCORES), answers="scores"), Oracle(always(SCORES), answers="labels")):
        assert oracle.labels(points(4)).tolist() == [1, 0, -1, -1]


def test_a_backend_may_give_labels_arrays_or_lists() -> None:
    answers: list[Any] = [
        torch.tensor([2, 0]),
        np.array([2, 0], dtype=np.int32),
        [2, 0],
        torch.tensor([2.0, 0.0]),
    ]
    for answer in answers:
        oracle = Oracle(always(answer), answers="labels", classes=3)
        labels = oracle.labels(points(2))
        assert labels.tolist() == [2, 0]
        assert labels.dtype == torch.long
        assert oracle.classes == 3
    scores = Oracle(always(np.eye(2))).scores(points(2))
    assert scores.dtype == torch.float32


def test_a_label_beyond_the_classes_is_one_line_and_scores_tell_the_classes_themselves() -> None:
    with pytest.raises(ModelError, match=r"^api answered the class 3, but has 3; pass the right classes$"):
        Oracle(always([0, 3]), answers="labels", classes=3, name="api").labels(points(2))
    oracle = Oracle(always(torch.eye(5)), answers="labels", classes=3)
    assert oracle.labels(points(5)).tolist() == [0, 1, 2, 3, 4]
    assert oracle.classes == 5


def test_a_labels_oracle_gives_no_scores_and_asks_nothing_for_the_attempt() -> None:
    backend = Backend()
    oracle = Oracle(backend, answers="labels", name="api")
    with pytest.raises(RobustError, match=r"^api gives labels only; use an attack that needs no scores$"):
        oracle.scores(points(1))
    assert backend.sent == []
    assert oracle.cost.queries == 0
    assert oracle.known_classes is None
    with pytest.raises(ModelError, match=r"^the oracle's number of classes is unknown; pass classes=$"):
        _ = oracle.classes


def test_the_budget_is_exact_and_hard() -> None:
    backend = Backend()
    oracle = Oracle(backend, budget=10, batch=4)
    oracle.scores(points(6))
    assert oracle.left == 4
    with pytest.raises(BudgetExceeded, match=r"^the query budget of 10 is spent: 5 asked, 4 left$"):
        oracle.scores(points(5))
    assert (oracle.cost.queries, oracle.left, sum(backend.sent)) == (6, 4, 6), (
        "a refused question costs nothing"
    )
    oracle.labels(points(4))
    assert (oracle.left, sum(backend.sent)) == (0, 10), "the last query is answered"
    with pytest.raises(BudgetExceeded):
        oracle.labels(points(1))
    assert sum(backend.sent) == 10
    assert Oracle(backend).left == float("inf")


def test_a_limit_lies_within_the_budget_and_ends() -> None:
    oracle = Oracle(Backend(), budget=10)
    oracle.scores(points(2))
    with oracle.limit(3):
        assert oracle.left == 3
        oracle.scores(points(3))
        with pytest.raises(BudgetExceeded):
            oracle.scores(points(1))
    assert oracle.left == 5
    with oracle.limit(100):
        assert oracle.left == 5, "a limit never widens the budget"
    with pytest.raises(KeyError), oracle.limit(1):
        raise KeyError
    assert (oracle.budget, oracle.left) == (10, 5)
    free = Oracle(Backend())
    with free.limit(2):
        assert free.left == 2
    assert free.budget is None


def test_a_call_that_fails_is_tried_again_after_longer_and_longer(waits: list[float]) -> None:
    for error in (ConnectionError, TimeoutError, OSError):
        backend, before = Backend(2, error), len(waits)
        oracle = Oracle(backend, retries=2)
        torch.testing.assert_close(oracle.scores(points(3)), points(3).flatten(1)[:, :3])
        assert backend.sent == [3, 3, 3]
        assert oracle.cost.queries == 3, "a repeated call is no new query"
        first, second = waits[before:]
        assert second == 2 * first > 0


def test_a_call_that_keeps_failing_is_one_line(waits: list[float]) -> None:
    backend = Backend(9)
    with pytest.raises(ModelError) as error:
        Oracle(backend, retries=1, name="api").scores(points(3))
    assert str(error.value) == "api did not answer after 2 tries: the line is busy"
    assert len(backend.sent) == 2
    assert len(waits) == 1, "it does not wait when it gives up"


def test_other_errors_are_no_reason_to_try_again(waits: list[float]) -> None:
    backend = Backend(1, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        Oracle(backend).scores(points(3))
    assert len(backend.sent) == 1
    assert waits == []


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(2, 3), "api answered (2, 3) to 3 points; one row each is right"),
        (torch.zeros(3, 2, 2), "api answered (3, 2, 2) to 3 points; one row each is right"),
        (torch.tensor(1.0), "api answered () to 3 points; one row each is right"),
        (torch.zeros(3), "api returned (3,); scores are (N, classes)"),
    ],
)
def test_a_wrong_answer_is_one_line(answer: Tensor, message: str) -> None:
    with pytest.raises(ModelError) as error:
        Oracle(always(answer), name="api").scores(points(3))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "options", [{"answers": "logits"}, {"budget": 0}, {"budget": -5}, {"batch": 0}, {"retries": -1}], ids=str
)
def test_impossible_options_are_one_line(options: dict[str, Any]) -> None:
    with pytest.raises(RobustError) as error:
        Oracle(Backend(), **options)
    assert f"{next(iter(options))}=" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_classifier_is_a_backend_and_lends_its_box_and_name() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 5)).train()
    clf = Classifier(module, bounds=(0, 255), name="mine")
    oracle = Oracle(clf, batch=3)
    torch.testing.assert_close(oracle.scores(points(7)), clf.logits(points(7)))
    assert (oracle.bounds, oracle.name, oracle.device, oracle.classes) == ((0, 255), "mine", clf.device, 5)
    assert oracle.cost.queries == 7
    assert clf.cost.forwards == 14
    assert module.training
    assert Oracle(Backend()).bounds == (0, 1)


def test_no_points_get_no_answers_and_send_nothing() -> None:
    backend = Backend()
    oracle = Oracle(backend, budget=1)
    assert oracle.scores(points(0)).shape[0] == 0
    assert oracle.labels(points(0)).shape == (0,)
    assert oracle.left == 1
