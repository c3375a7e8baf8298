"""Zero-concentrated DP: one number that adds up, blind to the sampling."""

from __future__ import annotations

import math

from robust.defenses.privacy.accountants.base import Accountant
from robust.defenses.privacy.accounting import Composition


class ZCDP(Accountant):
    """Zero-concentrated DP, which no sampling amplifies (Bun and Steinke 2016, arXiv:1605.02065)."""

    words = "zCDP, rho = sum of 1 / (2 sigma^2) over the steps"
    unamplified = True

    def epsilon(self, composition: Composition, delta: float) -> tuple[float, tuple[str, ...]]:
        """The smallest over all Renyi orders (Canonne, Kamath and Steinke 2020, arXiv:2004.00010, Prop. 12)."""
        from scipy.optimize import minimize_scalar

        rho = composition.mu**2 / 2
        # The order of the simpler bound rho + 2 sqrt(rho log(1/delta)) brackets the best one; any order gives a bound.
        start = math.log1p(math.sqrt(math.log(1 / delta) / rho)) if rho > 0 else 50.0

        def bound(t: float) -> float:
            above = math.exp(min(t, 600.0))  # order minus one
            order = above + 1
            return order * rho + math.log(above / order) - (math.log(delta) + math.log(order)) / above

        found = minimize_scalar(bound, bounds=(math.log(1e-6), start + 25), method="bounded")
        words = f"conversion: rho {rho:.4g}, from the best Renyi order (Canonne, Kamath and Steinke 2020, Prop. 12)"
        return max(0.0, float(found.fun)), (words,)
