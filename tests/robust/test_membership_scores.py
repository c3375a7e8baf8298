"""How good membership scores are: exact intervals, an exact chance, areas; and the picture of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from robust.errors import DataError
from robust.membership_figure import figure
from robust.membership_scores import chance, measure


def test_rates_counts_and_intervals_equal_those_counted_by_hand() -> None:
    generator = torch.Generator().manual_seed(2)
    members = torch.rand(5000, generator=generator) < 0.5
    scores = torch.randn(5000, generator=generator, dtype=torch.float64) + members * 1.0
    found = measure(scores, members)
    within, others = scores[members], scores[~members]
    for rate in (0.001, 0.01):
        told = found["tpr"][f"{rate:g}"]
        allowed = int(rate * len(others))
        threshold = others.sort(descending=True).values[allowed]  # the first other that must not be flagged
        assert told["count"] == int((within > threshold).sum())
        assert told["false"] == allowed
        exact = stats.binomtest(told["count"], told["of"]).proportion_ci(0.95, "exact")
        assert told["interval"] == pytest.approx([exact.low, exact.high], rel=1e-9)
    assert found["auc"] == pytest.approx(float((within[:, None] > others[None]).double().mean()))
    assert found["interval"][0] < stats.norm.cdf(1 / np.sqrt(2)) < found["interval"][1]
    best = max(float((within >= t).double().mean() + (others < t).double().mean()) for t in scores) / 2
    assert found["balanced_accuracy"] == pytest.approx(best)
    assert not found["at_chance"]


def test_the_chance_of_a_count_is_that_of_all_orders() -> None:
    members, others, wrong = 4, 5, 1
    orders = [set(places) for places in itertools.combinations(range(members + others), members)]

    def above(places: set[int]) -> int:
        """Members before the second of the others."""
        count = missed = 0
        for place in range(members + others):
            if place in places:
                count += 1
            elif missed == wrong:
                return count
            else:
                missed += 1
        return count

    for count in range(members + 1):
        exact = sum(above(places) >= count for places in orders) / len(orders)
        assert chance(count, members, wrong, others) == pytest.approx(exact)
    assert chance(0, 10, 3, 10) == chance(10, 10, 10, 10) == 1.0


def test_scores_without_meaning_are_at_chance_and_two_in_a_hundred_members_are_not() -> None:
    generator = torch.Generator().manual_seed(1)
    members = torch.arange(4000) % 2 == 0
    scores = torch.randn(4000, generator=generator, dtype=torch.float64)
    assert measure(scores, members)["at_chance"]
    given_away = members & (torch.arange(4000) < 120)
    found = measure(torch.where(given_away, 10 + scores, scores), members)
    assert found["tpr"]["0.001"]["fraction"] >= 0.03
    assert found["tpr"]["0.001"]["chance"] < 1e-6
    assert not found["at_chance"]


def test_ties_are_no_gain() -> None:
    members = torch.arange(200) < 100
    found = measure(torch.ones(200, dtype=torch.float64), members)
    assert found["auc"] == 0.5
    assert found["tpr"]["0.01"]["count"] == 0
    assert found["at_chance"]


def test_one_kind_alone_is_refused() -> None:
    with pytest.raises(DataError, match="3 of 3 samples are members"):
        measure(torch.rand(3), torch.ones(3, dtype=torch.bool))


def test_the_figure_has_every_curve_and_the_same_bytes() -> None:
    members = torch.arange(300) < 150
    rows = [
        {
            "name": f"attack {k}",
            **measure(torch.rand(300, generator=torch.Generator().manual_seed(k)), members),
        }
        for k in range(11)
    ]
    found = {"samples": {"members": 150, "others": 150}, "attacks": rows}
    drawn = figure(found)
    assert drawn == figure(found)
    assert all(f"attack {k} (" in drawn.decode() for k in range(11))
    assert "chance" in drawn.decode()
