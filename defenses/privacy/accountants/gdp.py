"""Gaussian differential privacy by its central limit theorem: an approximation, and labelled as one."""

from __future__ import annotations

import math

from robust.defenses.privacy.accountants.base import Accountant, gaussian_epsilon
from robust.defenses.privacy.accounting import Composition, Term


class GDP(Accountant):
    """Gaussian DP by a central limit theorem, an approximation that may understate (Bu et al. 2020, arXiv:1911.11607).

    Poisson batches by their Theorem 5, fixed-size ones by the limit of Dong, Roth and Su 2019 (arXiv:1905.02383,
    Corollary 4); full batches are exact.
    """

    words = "GDP, the limit of many small steps: an approximation that may understate, no guarantee"
    guaranteed = False

    def epsilon(self, composition: Composition, delta: float) -> tuple[float, tuple[str, ...]]:
        """The epsilon of the one Gaussian that the composition tends to."""
        if composition.full:
            mu, words = composition.mu, "conversion: exact here, as full batches are one Gaussian mechanism"
        else:
            parts = [_square(term, composition.sampling == "fixed") for term in composition.terms]
            mu = math.sqrt(math.fsum(parts))
            words = f"conversion: as a Gaussian mechanism with mu {mu:.4g}"
        if mu < 1e-150:
            return 0.0, (words,)
        return (gaussian_epsilon(mu, delta) if mu < 1e6 else math.inf), (words,)


def _square(term: Term, fixed: bool) -> float:
    """The square of the limit's mu: what a term adds."""
    sigma, rate, count = term
    if rate == 1:
        return count / sigma**2
    try:
        moment = math.expm1(sigma**-2)
        if fixed:
            # 2 (e^(1/s^2) Phi(1.5/s) + 3 Phi(-0.5/s) - 2), written so that small 1/s^2 does not cancel.
            moment = 2 * (
                moment * _phi(1.5 / sigma) + (_phi(1.5 / sigma) - 0.5) - 3 * (0.5 - _phi(-0.5 / sigma))
            )
    except OverflowError:
        return math.inf
    return count * rate**2 * moment


def _phi(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2
