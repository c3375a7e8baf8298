"""Decisions: float32 outcomes, doubts within float noise, and for randomised models a majority keyed by the sample."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from robust.classifier import FLOAT_NOISE, Classifier, clear, misclassified
from robust.decide import BATCH, DRAWS, Decision, decide, outcome
from robust.oracle import Oracle


class Given(nn.Module):
    """Logits are the pixels, changed by a function."""

    def __init__(self, change: Callable[[Tensor], Tensor] = lambda z: z) -> None:
        super().__init__()
        self.change = change
        self.batches: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        self.batches.append(len(x))
        return self.change(x.flatten(1))


def points(rows: list[list[float]]) -> Tensor:
    """Points whose pixels are the logits."""
    return torch.tensor(rows)[:, None, None, :]


def fixed(change: Callable[[Tensor], Tensor] = lambda z: z) -> Classifier:
    """A deterministic classifier."""
    return Classifier(Given(change).eval(), bounds=(-10, 10))


def noisy(sigma: float) -> Classifier:
    """A classifier that adds noise from torch's generator, and knows that it does."""
    clf = fixed(lambda z: z + sigma * torch.randn_like(z))
    clf.randomised = True
    return clf


def same(a: Decision, b: Decision, rows: Tensor | slice = slice(None)) -> bool:
    """Whether two decisions agree, the second one's rows taken."""
    return all(
        torch.equal(getattr(a, name), getattr(b, name)[rows]) for name in Decision.__dataclass_fields__
    )


# ------------------------------------------------------------------------------------------------ deterministic models


def test_misclassified_and_clear_agree_with_the_definition() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0 + 1e-6, 0.0], [1.0, 2.0, 0.0], [torch.nan, 5.0, 0.0]])
    y, targets = torch.zeros(4, dtype=torch.long), torch.tensor([1, 1, 1, 1])
    assert misclassified(logits, y).tolist() == [False, True, True, True]
    assert misclassified(logits, y, targets).tolist() == [False, True, True, False], "NaN reaches no target"
    assert clear(logits, y).tolist() == [True, False, True, True]
    assert clear(1e4 * logits[:3], y[:3]).tolist() == [True, False, True], "float noise grows with the logits"
    assert clear(logits, y, targets).tolist() == [True, False, True, True]


def test_the_outcome_is_the_largest_logit() -> None:
    x = points([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    y = torch.tensor([0, 0, 1])
    found = decide(fixed(), x, y)
    assert found.hit.tolist() == [False, True, True]
    assert found.prediction.tolist() == [0, 1, 2]
    assert found.sure.all()
    assert found.firm.all()
    torch.testing.assert_close(found.confidence, x.flatten(1).softmax(1).amax(1))


def test_towards_targets_only_the_target_counts() -> None:
    x = points([[2.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    found = decide(fixed(), x, torch.tensor([0, 0, 0]), targets=torch.tensor([1, 1, 1]))
    assert found.hit.tolist() == [False, True, False]


def test_an_outcome_within_float_noise_is_not_sure() -> None:
    """A row may be surely wrong, and yet unsure of which wrong class it is."""
    half, twice = FLOAT_NOISE / 2, FLOAT_NOISE * 2
    x = points(
        [[1.0, 1.0 + half, 0.0], [1.0, 1.0 + twice, 0.0], [0.0, 1.0, 1.0 + half], [1.0, 1.0 - half, 0.0]]
    )
    found = decide(fixed(), x, torch.zeros(4, dtype=torch.long))
    assert found.hit.tolist() == [True, True, True, False]
    assert found.sure.tolist() == [False, True, True, False]
    assert found.firm.tolist() == [False, True, False, False]


def test_nan_and_infinity_are_misclassified_for_sure_and_reach_no_target() -> None:
    x = points([[1.0, 0.0, 0.0]] * 3)
    broken = torch.tensor([[torch.nan, 0.0, 9.0], [torch.inf, 0.0, 0.0], [5.0, -torch.inf, 0.0]])
    clf, y = fixed(lambda z: broken[: len(z)]), torch.zeros(3, dtype=torch.long)
    found = decide(clf, x, y)
    assert found.hit.all()
    assert found.sure.all()
    assert found.firm.all()
    assert found.prediction.tolist() == [-1, -1, -1]
    assert found.confidence.tolist() == [0.0, 0.0, 0.0]
    assert not decide(clf, x, y, targets=torch.full((3,), 2)).hit.any()


def test_large_inputs_go_in_batches_and_none_is_lost() -> None:
    clf = fixed()
    x = points(torch.randn(2 * BATCH + 3, 3, generator=torch.Generator().manual_seed(0)).tolist())
    y = torch.zeros(len(x), dtype=torch.long)
    found = decide(clf, x, y)
    assert torch.equal(found.prediction, x.flatten(1).argmax(1))
    assert clf.module.batches == [BATCH, BATCH, 3]
    assert len(decide(clf, x[:0], y[:0]).hit) == 0


def test_an_oracle_s_answers_are_outcomes_that_cost_queries() -> None:
    x, y = points([[2.0, 1.0], [1.0, 2.0]]), torch.zeros(2, dtype=torch.long)
    oracle = Oracle(lambda x: x.flatten(1), answers="labels")
    found = outcome(oracle, x, y, torch.arange(2), 0)
    assert found.hit.tolist() == [False, True]
    assert found.prediction.tolist() == [0, 1]
    assert oracle.cost.queries == 2
    assert same(outcome(fixed(), x, y, torch.arange(2), 0), decide(fixed(), x, y))


# --------------------------------------------------------------------------------------------------- randomised models


def undecided(n: int = 12) -> tuple[Tensor, Tensor]:
    """Points near the boundary: their votes differ."""
    lead = torch.linspace(-0.5, 0.5, n)
    return points(torch.stack((lead, torch.zeros(n), torch.full((n,), -2.0)), dim=1).tolist()), torch.zeros(
        n
    ).long()


def test_the_majority_belongs_to_the_sample_and_not_to_its_batch() -> None:
    clf, (x, y) = noisy(0.5), undecided()
    index = torch.arange(12) * 7 + 100
    whole = decide(clf, x, y, index=index, seed=3)
    assert whole.sure.any()
    assert not whole.sure.all(), "the points are near enough to be undecided"
    assert same(decide(clf, x, y, index=index, seed=3), whole)
    rows = torch.tensor([9, 0, 5])
    assert same(decide(clf, x[rows], y[rows], index=index[rows], seed=3), whole, rows)
    for row in range(12):
        one = slice(row, row + 1)
        assert same(decide(clf, x[one], y[one], index=index[one], seed=3), whole, one)


def test_other_seeds_and_other_samples_draw_other_noise() -> None:
    clf, (x, y) = noisy(0.5), undecided()
    index = torch.arange(12)
    whole = decide(clf, x, y, index=index, seed=3)
    assert not torch.equal(decide(clf, x, y, index=index, seed=4).confidence, whole.confidence)
    assert not torch.equal(decide(clf, x, y, index=index + 12, seed=3).confidence, whole.confidence)
    assert same(decide(clf, x, y, seed=3), whole), "0…N−1 is the default"
    equal = x[:1].expand(12, *x.shape[1:]).contiguous()
    assert len(set(decide(clf, equal, y, seed=3).confidence.tolist())) == 12


def test_the_majority_is_over_all_draws() -> None:
    clf, (x, y) = noisy(0.0), undecided(4)
    found = decide(clf, x, y)
    assert clf.module.batches == [DRAWS] * 4
    assert DRAWS % 2 == 1, "a tie would need a rule"
    assert same(found, decide(fixed(), x, y)) or found.hit.tolist() == decide(fixed(), x, y).hit.tolist()


@pytest.mark.parametrize(
    ("wrong", "hit", "sure"), [(12, False, False), (13, True, False), (11, False, True), (14, True, True)]
)
def test_more_than_half_of_the_votes_decide(wrong: int, hit: bool, sure: bool) -> None:
    """A lead of one vote in 25 is not sure."""
    votes = torch.tensor([[0.0, 1.0]] * wrong + [[1.0, 0.0]] * (DRAWS - wrong))
    clf = fixed(lambda z: votes)
    clf.randomised = True
    found = decide(clf, points([[0.0, 0.0]]), torch.tensor([0]))
    assert (found.hit.item(), found.sure.item()) == (hit, sure)
    assert found.firm.item() is sure
    assert found.prediction.item() == int(hit)


def test_the_prediction_is_the_most_frequent_one() -> None:
    votes = torch.eye(3)[torch.tensor([0] * 9 + [1] * 10 + [2] * 6)]
    clf = fixed(lambda z: votes)
    clf.randomised = True
    found = decide(clf, points([[0.0, 0.0, 0.0]]), torch.tensor([0]))
    assert found.hit.item(), "sixteen of twenty-five are wrong"
    assert found.prediction.item() == 1
    assert not found.firm.item(), "ten against nine"
    towards = decide(clf, points([[0.0, 0.0, 0.0]]), torch.tensor([0]), targets=torch.tensor([1]))
    assert not towards.hit.item(), "ten are not the majority"


def test_the_user_s_generator_goes_on_as_if_nothing_had_been_drawn() -> None:
    clf, (x, y) = noisy(0.5), undecided(3)
    torch.manual_seed(11)
    expected = torch.rand(5)
    torch.manual_seed(11)
    decide(clf, x, y)
    assert torch.equal(torch.rand(5), expected)


def test_a_randomised_model_s_nan_counts_as_a_vote_against_it() -> None:
    clf = fixed(lambda z: torch.full_like(z, torch.nan))
    clf.randomised = True
    found = decide(clf, points([[1.0, 0.0]]), torch.tensor([0]))
    assert (found.hit.item(), found.sure.item(), found.prediction.item()) == (True, True, -1)
    assert len(decide(clf, points([[1.0, 0.0]])[:0], torch.zeros(0, dtype=torch.long)).hit) == 0
