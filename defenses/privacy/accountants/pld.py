"""The default accountant: the privacy loss itself, composed numerically, rounded so that it never understates."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from robust.defenses.privacy.accountants.base import (
    Accountant,
    Unanswered,
    gaussian_epsilon,
    hushed,
    package,
    thin,
)
from robust.defenses.privacy.accountants.rdp import RDP
from robust.defenses.privacy.accounting import Composition, Term

LARGEST = 400.0  # above it exp(loss) leaves float64, and a bound promises nothing anyway
POINTS = 2_000_000


class PLD(Accountant):
    """Privacy loss distributions by dp-accounting, connecting the dots (Doroshenko et al. 2022, arXiv:2207.04380).

    Add and remove are composed apart and the worse one counts. Fixed-size batches have no pair of distributions that is
    worst for both and stays so in composition (Lebeda et al. 2024, arXiv:2405.20769), so they are refused.
    """

    samplings = ("poisson", "shuffled")
    refusal = "without replacement no pair of loss distributions stays the worst under composition"
    words = "PLD, the distribution of the privacy loss composed numerically (dp-accounting)"

    def epsilon(self, composition: Composition, delta: float) -> tuple[float, tuple[str, ...]]:
        """Read off the composed distribution; full batches have it in closed form."""
        if composition.full:
            words = "conversion: exact, as full batches are one Gaussian mechanism (Balle and Wang 2018)"
            return gaussian_epsilon(composition.mu, delta), (words,)
        rough, _ = RDP().epsilon(composition, delta)
        if rough > LARGEST:
            raise Unanswered(
                f"accountant pld stops at epsilon {LARGEST:g}, and rdp bounds this one by {rough:.4g}: little privacy"
            )
        terms, notes = thin(composition.terms)
        grid = mesh(terms, rough)
        found = composed(terms, grid).get_epsilon_for_delta(delta)
        words = f"conversion: read off the composed losses, rounded up on a grid of {grid:g}"
        return float(found), (*notes, words)


def mesh(terms: tuple[Term, ...], rough: float) -> float:
    """The grid of the losses: fine against one step's loss, coarse enough to be cheap; a bound whatever it is."""
    fine = min(rate * math.sqrt(math.expm1(min(sigma**-2, 50.0))) for sigma, rate, _ in terms) / 10
    wide = max(sigma**-2 + 20 / sigma for sigma, _, _ in terms) / POINTS
    return max(min(fine, 1e-4 if rough <= 20 else 1e-3), 1e-5, wide)


def composed(terms: tuple[Term, ...], grid: float) -> Any:
    """dp-accounting's distribution of the summed loss, as a `PrivacyLossDistribution`."""
    with hushed():
        whole, *rest = (_one(sigma, rate, grid).self_compose(count) for sigma, rate, count in terms)
        for part in rest:
            whole = whole.compose(part)
    return whole


@lru_cache(maxsize=40)
def _one(sigma: float, rate: float, grid: float) -> Any:
    """One step's distribution; the composition of many differs only in the count."""
    distribution = package("dp_accounting.pld", "pld").privacy_loss_distribution
    return distribution.from_gaussian_mechanism(
        standard_deviation=sigma, sampling_prob=rate, value_discretization_interval=grid
    )
