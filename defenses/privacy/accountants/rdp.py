"""Renyi accounting: fast, additive, never below the truth, and the only one here for fixed-size batches."""

from __future__ import annotations

from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from robust.defenses.privacy.accountants.base import Accountant, hushed, package, thin
from robust.defenses.privacy.accounting import Composition


class RDP(Accountant):
    """Renyi differential privacy by dp-accounting (Mironov et al. 2019, arXiv:1908.10530).

    Poisson batches by Mironov et al.; fixed-size ones under replacement by Wang, Balle and Kasiviswanathan 2019
    (arXiv:1808.00087, Theorem 27).
    """

    words = "RDP, moments of the privacy loss, a looser bound (dp-accounting)"

    def epsilon(self, composition: Composition, delta: float) -> tuple[float, tuple[str, ...]]:
        """The smallest epsilon over the orders (Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Prop. 12)."""
        terms, notes = thin(composition.terms, 64)
        with hushed():
            module = package("dp_accounting.rdp", "rdp")
            total = sum(
                (count * _moments(sigma, rate, composition.sampling == "fixed") for sigma, rate, count in terms),
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
    accountant = package("dp_accounting.rdp", "rdp").RdpAccountant(neighboring_relation=relation)
    return accountant.compose(event).rdp
