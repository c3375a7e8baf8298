"""Fifty settings of DP-SGD by every accountant, and full batches against their closed form.

    python -m robust.experiments.privacy.measure OUT

OUT becomes grid.json, the record. About three minutes on one core.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from robust.conditions import conditions
from robust.defenses.privacy import Mechanism, epsilon
from robust.defenses.privacy.accountants.base import hushed
from robust.defenses.privacy.accountants.pld import composed, mesh
from robust.defenses.privacy.accounting import compose
from robust.digest import write_json
from robust.errors import ConfigError

SIGMAS = (0.7, 1.0, 1.5, 2.5, 5.0)
SCHEDULES = ((0.001, 20_000), (0.004, 5_000), (0.01, 1_000), (0.05, 500), (0.2, 100))  # rate, steps
DELTAS = (1e-5, 1e-7)
FULL = tuple(itertools.product((1.0, 4.0, 20.0), (1, 100), DELTAS))  # sigma, steps, delta at rate 1
OURS = ("pld", "prv", "rdp", "gdp")


def setting(sigma: float, rate: float, steps: int, delta: float) -> dict[str, Any]:
    """One row: the setting, our accountants' epsilons, and RDP by either library."""
    found = {
        name: float(
            epsilon(noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta, accountant=name)
        )
        for name in OURS
    }
    row = {"noise_multiplier": sigma, "sample_rate": rate, "steps": steps, "delta": delta}
    libraries = {"opacus_rdp": opacus_rdp, "dp_accounting_rdp": dp_accounting_rdp}
    return {**row, **found, **{name: theirs(sigma, rate, steps, delta) for name, theirs in libraries.items()}}


def dp_accounting_rdp(sigma: float, rate: float, steps: int, delta: float) -> float:
    """dp-accounting's RDP accountant as it comes, with its own fractional orders."""
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    event = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(sigma))
    with hushed():
        accountant = RdpAccountant().compose(dp_accounting.SelfComposedDpEvent(event, steps))
        return float(accountant.get_epsilon(delta))


def opacus_rdp(sigma: float, rate: float, steps: int, delta: float) -> float:
    """Opacus's RDP accountant, on the orders of dp-accounting's."""
    from dp_accounting.rdp.rdp_privacy_accountant import DEFAULT_RDP_ORDERS
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(sigma, rate, steps)]
    with hushed():
        return float(accountant.get_epsilon(delta, alphas=list(DEFAULT_RDP_ORDERS)))


def full(sigma: float, steps: int, delta: float) -> dict[str, Any]:
    """Full batches: in closed form, numerically on the grid that other rates are composed on, and by PRV."""
    terms = compose([(Mechanism(noise_multiplier=sigma), steps)]).terms
    closed = float(epsilon(noise_multiplier=sigma, sample_rate=1.0, steps=steps, delta=delta))
    grid = float(composed(terms, mesh(terms, closed)).get_epsilon_for_delta(delta))
    prv = float(epsilon(noise_multiplier=sigma, sample_rate=1.0, steps=steps, delta=delta, accountant="prv"))
    row = {"noise_multiplier": sigma, "steps": steps, "delta": delta}
    return {**row, "closed": closed, "grid": grid, "prv": prv}


def fixed(sigma: float, rate: float, steps: int, delta: float) -> dict[str, Any]:
    """Fixed-size batches under replacement, the noise over the sensitivity and over the clipping norm."""
    found = {
        unit: float(
            epsilon(
                noise_multiplier=sigma, sample_rate=rate, steps=steps, delta=delta, accountant="rdp",
                sampling="fixed", noise_over=unit,
            )
        )
        for unit in ("sensitivity", "clip")
    }  # fmt: skip
    return {"noise_multiplier": sigma, "sample_rate": rate, "steps": steps, "delta": delta, **found}


def versions() -> dict[str, str]:
    """The versions of both libraries."""
    from importlib.metadata import version

    return {name: version(name) for name in ("dp-accounting", "opacus")}


def measure(say: Callable[[str], None] = print) -> dict[str, Any]:
    """The record."""
    told = conditions(torch.device("cpu"))
    told["versions"] |= versions()
    rows = []
    for sigma, (rate, steps), delta in itertools.product(SIGMAS, SCHEDULES, DELTAS):
        rows.append(setting(sigma, rate, steps, delta))
        say(str(rows[-1]))
    closed = [full(*item) for item in FULL]
    return {**told, "settings": rows, "full": closed, "fixed": [fixed(1.0, 0.01, 1_000, 1e-5)]}


def main(arguments: list[str]) -> int:
    """The command line."""
    if len(arguments) != 1:
        print("usage: python -m robust.experiments.privacy.measure OUT", file=sys.stderr)
        return 2
    try:
        write_json(Path(arguments[0]), measure(lambda line: print(line, flush=True)))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
