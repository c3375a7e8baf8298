"""Renyi accounting: fast, additive, never below the truth, and the only one here for fixed-size batches."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from robust.defenses.privacy.accountants.base import Accountant, hushed, package, thin
from robust.defenses.privacy.accounting import Composition

MOST = 128  # different steps that are composed as they are
SHARPEST = 0.02  # below this noise the quadrature would need too many points, and nothing is private anyway

ROUNDING = 1e-14  # of log E(...), added so that what rounds to nothing stays above the truth


class RDP(Accountant):
    """Renyi differential privacy by dp-accounting (Mironov et al. 2019, arXiv:1908.10530).

    Poisson batches by Mironov et al.; fixed-size ones under replacement by Wang, Balle and Kasiviswanathan 2019
    (arXiv:1808.00087, Theorem 27).
    """

    words = "RDP, moments of the privacy loss, a looser bound (dp-accounting)"

    def epsilon(self, composition: Composition, delta: float) -> tuple[float, tuple[str, ...]]:
        """The smallest epsilon over the orders (Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Prop. 12)."""
        terms, notes = thin(composition.terms, MOST)
        with hushed():
            module = package("dp_accounting.rdp", "rdp")
            total = sum(
                (
                    count * _moments(sigma, rate, composition.sampling == "fixed")
                    for sigma, rate, count in terms
                ),
                np.zeros(len(_orders())),
            )
            found, order = module.compute_epsilon(_orders(), total, delta)
        words = f"conversion: from Renyi order {order:g} (Canonne, Kamath and Steinke 2020, Prop. 12)"
        return float(found), (*notes, words)


def _orders() -> Any:
    return package("dp_accounting.rdp", "rdp").rdp_privacy_accountant.DEFAULT_RDP_ORDERS


@lru_cache(maxsize=1024)
def _moments(sigma: float, rate: float, fixed: bool) -> Any:
    """The Renyi divergences of one step at every order: what an accountant adds up."""
    dp = package("dp_accounting", "rdp")
    event = dp.GaussianDpEvent(sigma)
    relation = dp.NeighboringRelation.REPLACE_ONE if fixed else dp.NeighboringRelation.ADD_OR_REMOVE_ONE
    if rate < 1 and fixed:
        share = Fraction(rate).limit_denominator(10**9)
        event = dp.SampledWithoutReplacementDpEvent(share.denominator, share.numerator, event)
    elif rate < 1:
        event = dp.PoissonSampledDpEvent(rate, event)
    orders = np.array(_orders())
    ours = (orders != np.floor(orders)) & (0 < rate < 1 and not fixed and sigma > SHARPEST)
    moments = np.empty(len(orders))
    theirs = package("dp_accounting.rdp", "rdp").RdpAccountant(orders[~ours], relation)
    moments[~ours] = theirs.compose(event).rdp
    moments[ours] = [fractional(sigma, rate, order) for order in orders[ours]]
    # At rates below 1e-7 a divergence is smaller than the rounding errors of its logarithm, here and in the library.
    return moments + (ROUNDING / (orders - 1) if 0 < rate < 1 else 0.0)


def fractional(sigma: float, rate: float, order: float) -> float:
    """The Renyi divergence of one Poisson-sampled Gaussian step at any order above 1, by quadrature.

    dp-accounting 0.6 sums the series for fractional orders without its signs: a bound, but loose below order 3, or
    none. The expectation itself, E (1 - q + q exp((2z - 1) / (2 sigma^2)))^order over z ~ N(0, sigma^2) (Mironov et al.
    2019, section 3.3), is smooth, and the trapezoidal rule converges exponentially: its error falls like
    exp(-2 pi^2 sigma^2 / h) in the spacing h, as the nearest singularity is pi sigma^2 off the real line.
    """
    spacing = min(sigma / 8, sigma**2 / 3)
    z = np.arange(-12 * sigma, order + 12 * sigma, spacing)
    ratio = np.logaddexp(math.log1p(-rate), math.log(rate) + (2 * z - 1) / (2 * sigma**2))
    logs = order * ratio - z**2 / (2 * sigma**2)
    top = logs.max()
    total = (
        top + math.log(float(np.exp(logs - top).sum()) * spacing) - math.log(sigma * math.sqrt(2 * math.pi))
    )
    return max(float(total), 0.0) / (order - 1)
