"""Opacus's numerical accountant: a second opinion on the default one, with its own code and its own error bars."""

from __future__ import annotations

import math

from robust.defenses.privacy.accountants.base import Accountant, Unanswered, hushed, package, thin
from robust.defenses.privacy.accounting import Composition, Term
from robust.errors import first_line

POINTS = 1 << 22  # of the grid of losses
LARGEST = 500.0  # of the losses; above it exp(loss) leaves float64


class PRV(Accountant):
    """Privacy random variables by Opacus, an upper bound with its error added (Gopi et al. 2021, arXiv:2106.02848).

    It composes the loss of removing a record, which is the worse of the two for Poisson-sampled Gaussians as far as is
    known, though not proven (PLD composes both).
    """

    samplings = ("poisson", "shuffled")
    refusal = "Opacus's loss variable is that of Poisson batches"
    words = "PRV, the distribution of the loss of removing a record composed numerically (Opacus)"

    def epsilon(self, composition: Composition, delta: float) -> tuple[float, tuple[str, ...]]:
        """Opacus's upper estimate; its error is at most 0.01, and at most half a percent while the grid allows."""
        terms, notes = thin(composition.terms)
        with hushed():
            error, reach = _error(terms, delta)
            if reach > LARGEST:
                raise Unanswered(
                    f"accountant prv stops at losses of {LARGEST:g}, and these reach {reach:.4g}: hardly any privacy"
                )
            accountant = package("opacus.accountants", "prv").PRVAccountant()
            accountant.history = [(sigma, rate, count) for sigma, rate, count in terms]
            try:
                found = float(accountant.get_epsilon(delta, eps_error=error))
            except (ValueError, RuntimeError) as problem:
                raise Unanswered(
                    f"accountant prv gives up: {first_line(problem)}; rdp and pld can"
                ) from problem
        if not math.isfinite(found):
            raise Unanswered(
                "accountant prv gives up: its numbers left the range of float64; rdp and pld can"
            )
        return max(found, 0.0), (
            *notes,
            f"conversion: an upper estimate, with its error of {error:.2g} added",
        )


def _error(terms: tuple[Term, ...], delta: float) -> tuple[float, float]:
    """The error to ask for, and how far the losses reach.

    Opacus's grid has ``error / sqrt(steps log(12 / delta_error) / 2)`` between its points (Gopi et al. 2021,
    Theorem 5.5).
    """
    prv = package("opacus.accountants.analysis.prv", "prv")
    rough = package("opacus.accountants", "prv").RDPAccountant()
    rough.history = [(sigma, rate, count) for sigma, rate, count in terms]
    wanted = min(0.01, 0.005 * float(rough.get_epsilon(delta)))
    reach = float(
        prv.compute_safe_domain_size(
            [prv.PoissonSubsampledGaussianPRV(rate, sigma) for sigma, rate, _ in terms],
            [count for _, _, count in terms], eps_error=0.01, delta_error=delta / 1000,
        )
    )  # fmt: skip
    steps = sum(count for _, _, count in terms)
    finest = 2 * reach / POINTS * math.sqrt(steps * math.log(12_000 / delta) / 2)
    return max(wanted, finest), reach
