"""Exact binomial statements about a vote: lower bounds, and a sequence of them that holds at every look at once."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust.errors import RobustError

Array = NDArray[Any]
Draw = Callable[[Array, int, int], Array]

_RATIO = 0.5**0.5  # between one look and the next
_FIRST = 64  # votes: looks are its multiples, which batches of votes fill
_EARLY = 0.3  # of alpha is spent before the last look
_HOPELESS = 0.002  # chance of success below which a radius is given up


def lower_bound(successes: Array | int, total: Array | int, alpha: float) -> Array:
    """The one-sided Clopper-Pearson bound: below the true probability with confidence 1 − alpha.

    Args:
        successes: how many of `total` independent trials succeeded; arrays of one shape, or numbers.
        alpha: the chance that the bound is above the true probability, at most this for every probability.

    Returns:
        float64 in [0, 1); 0 without successes, and without trials.
    """
    from scipy.special import betaincinv

    k, n = np.asarray(successes, dtype=np.float64), np.asarray(total, dtype=np.float64)
    found: Array = np.where(k > 0, betaincinv(np.maximum(k, 1), np.maximum(n - k, 0) + 1, alpha), 0.0)
    return found


def least(total: int, probability: float, alpha: float) -> int:
    """The fewest successes of `total` whose lower bound is above `probability`; total + 1 where none is."""
    from scipy.stats import binom

    if probability >= 1:
        return total + 1
    k = int(binom.isf(alpha, total, probability)) + 1
    while k <= total and not lower_bound(k, total, alpha) > probability:
        k += 1
    while k > 0 and lower_bound(k - 1, total, alpha) > probability:
        k -= 1
    return min(k, total + 1)


@dataclass(frozen=True)
class Plan:
    """When to look at the votes, and what each look may spend: planned before the first vote.

    Every look uses a Clopper-Pearson bound with its own share of alpha. The shares add up to alpha, so by the union
    bound *all* bounds hold at once with confidence 1 − alpha, whenever and for whatever reason one stops (alpha
    spending, Lan & DeMets 1983; for smoothing Horváth et al. 2022, arXiv:2110.06080). Three tenths are spent before
    the last look, in equal parts, which leaves the last one nearly as strong as a single look. The largest bound
    so far is a bound too; so one sequence decides any number of thresholds. That a hopeless threshold is
    given up costs power and never confidence.

    Attributes:
        thresholds: probabilities, each of which the vote's is to be shown to exceed.
        n: the most votes.
        alpha: the chance that any bound is above the true probability.
    """

    thresholds: tuple[float, ...]
    n: int
    alpha: float

    def __post_init__(self) -> None:
        check_votes(self.n, self.alpha)

    @functools.cached_property
    def looks(self) -> tuple[int, ...]:
        """Ascending numbers of votes, the last one n."""
        found, at = {self.n}, self.n * _RATIO
        while at >= _FIRST:
            found.add(min(math.ceil(at / _FIRST) * _FIRST, self.n))
            at *= _RATIO
        return tuple(sorted(found))

    @functools.cached_property
    def shares(self) -> tuple[float, ...]:
        """What each look spends of alpha; they add up to it."""
        early = len(self.looks) - 1
        if not early:
            return (self.alpha,)
        return (*([_EARLY * self.alpha / early] * early), (1 - _EARLY) * self.alpha)

    def run(self, draw: Draw, rows: int) -> Decisions:
        """Looks until every row's thresholds are shown or given up.

        Args:
            draw: called with the numbers of the rows still open, the first vote and how many; gives their successes.
            rows: how many there are.
        """
        targets = np.asarray(self.thresholds)
        successes, used = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        lower, given_up = np.zeros(rows), np.zeros((rows, len(targets)), bool)
        done = 0
        for look, total in enumerate(self.looks):
            (open_rows,) = np.nonzero(((lower[:, None] <= targets) & ~given_up).any(1))
            if not len(open_rows):
                break
            successes[open_rows] += draw(open_rows, done, total - done)
            used[open_rows] = done = total
            found = successes[open_rows]
            lower[open_rows] = np.maximum(lower[open_rows], lower_bound(found, total, self.shares[look]))
            given_up[open_rows] |= found[:, None] < self.hopeful[look]
        return Decisions(successes, used, lower, lower[:, None] > targets)

    @functools.cached_property
    def hopeful(self) -> Array:
        """(looks, thresholds): the fewest successes with which passing the last look is not hopeless."""
        last = [least(self.n, p, self.shares[-1]) for p in self.thresholds]
        return np.array([[_fewest(total, self.n - total, need) for need in last] for total in self.looks])


def _fewest(total: int, left: int, need: int) -> int:
    """The smallest k of `total` for which `need` of all are not hopeless; the chance rises with k."""
    low, high = 0, total + 1
    while low < high:
        middle = (low + high) // 2
        if _chance(middle, total, left, need) < _HOPELESS:
            low = middle + 1
        else:
            high = middle
    return low


def _chance(k: int, total: int, left: int, need: int) -> float:
    """Of at least need − k successes in `left` more, after k of `total`, from a uniform prior (beta-binomial)."""
    from scipy.special import betaln

    more = np.arange(max(need - k, 0), left + 1, dtype=np.float64)
    choose = -np.log(left + 1.0) - betaln(left - more + 1, more + 1)
    terms = choose + betaln(k + 1 + more, total - k + 1 + left - more) - betaln(k + 1, total - k + 1)
    return float(np.exp(terms).sum())


@dataclass(frozen=True, eq=False)
class Decisions:
    """What a plan found, a row each.

    Attributes:
        successes, used: (rows,) votes for the class, and in all.
        lower: (rows,) the largest bound: below the true probability with confidence 1 − alpha.
        shown: (rows, thresholds) whether the bound is above the threshold.
    """

    successes: Array
    used: Array
    lower: Array
    shown: Array


def check_votes(n: int, alpha: float, name: str = "n") -> None:
    """Raises one line unless there are votes and alpha is a chance."""
    if n < 1:
        raise RobustError(f"smoothing: {name}={n} votes decide nothing; give at least 1, such as 10000")
    if not 0 < alpha < 1:
        raise RobustError(f"smoothing: alpha={alpha} is no chance of error; give one in (0, 1) such as 0.001")
