"""What every accountant is: a rule from composed Gaussian mechanisms to an epsilon, and what it can serve."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np

from robust.defenses.privacy.accounting import Composition, Term
from robust.errors import ConfigError

ALL = ("poisson", "fixed", "shuffled")
# Distinct noises and rates that are composed as they are; more are rounded to the side of less privacy.
MOST = 32


class Unanswered(ConfigError):
    """An epsilon that an accountant serves in principle, but that is too large for it to compute."""


class Accountant(ABC):
    """An accountant.

    Attributes:
        samplings: the sampling schemes it can serve; refusal: why it cannot serve the others.
        words: what it is, for the statement beside every number.
        guaranteed: its number is an upper bound; unamplified: it counts every step as if it saw all records.
    """

    samplings: ClassVar[tuple[str, ...]] = ALL
    refusal: ClassVar[str] = ""
    words: ClassVar[str]
    guaranteed: ClassVar[bool] = True
    unamplified: ClassVar[bool] = False

    @abstractmethod
    def epsilon(self, composition: Composition, delta: float) -> tuple[float, tuple[str, ...]]:
        """The epsilon of a composition with at least one term, and what is to be said about it.

        Raises:
            Unanswered: it is too large to compute. ConfigError: a package is missing.
        """


def package(name: str, user: str) -> Any:
    """An optional package, imported where it is used; a missing one is one line."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"accountant {user} needs {name.partition('.')[0]}: pip install 'robust-toolkit[privacy]'"
        ) from error


def thin(terms: tuple[Term, ...], most: int = MOST) -> tuple[tuple[Term, ...], tuple[str, ...]]:
    """At most `most` terms in place of many, each at least as leaky as those it stands for; and a note if any changed.

    A schedule may change the noise at every step. Noises are rounded down and rates up to a logarithmic grid no wider
    than needed: epsilon falls with the noise and rises with the rate, so it stays a bound. The grid is a fixed one, so
    that what was computed of its points serves again when the schedule has gone on.
    """
    width, thinned = 2e-3, terms
    while len(thinned) > most:
        points: dict[tuple[float, float], int] = {}
        for sigma, rate, count in terms:
            low = min(sigma, math.exp(math.floor(math.log(sigma) / width) * width))
            high = min(1.0, max(rate, math.exp(math.ceil(math.log(rate) / width) * width)))
            points[low, high] = points.get((low, high), 0) + count
        thinned, width = tuple(Term(*point, count) for point, count in points.items()), 1.25 * width
    if thinned is terms:
        return terms, ()
    note = (
        f"{len(terms)} different steps are composed as {len(thinned)}, noises rounded down and rates up by at most "
        f"{width / 1.25:.1%}"
    )
    return thinned, (note,)


@contextmanager
def hushed() -> Iterator[None]:
    """Silences what the libraries say of orders and tails that they leave out; what they return stays a bound."""
    absl = sys.modules.get("absl.logging")
    level = absl.get_verbosity() if absl else 0
    try:
        if absl:
            absl.set_verbosity(absl.ERROR)
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if absl:
            absl.set_verbosity(level)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The exact epsilon of a Gaussian mechanism with noise 1/mu (Balle and Wang 2018, arXiv:1805.06530, Theorem 8)."""
    with hushed():
        return float(package("dp_accounting", "of full batches").get_epsilon_gaussian(1 / mu, delta))
