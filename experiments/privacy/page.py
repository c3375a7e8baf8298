"""The README's part that is made from the record: ``python -m robust.experiments.privacy.page [--write]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from robust.digest import read_json
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.pages import Page

FOLDER = Path(__file__).parent
README, RECORD = FOLDER / "README.md", FOLDER / "grid.json"
COLUMNS = {
    "pld": "PLD",
    "prv": "PRV",
    "rdp": "RDP",
    "opacus_rdp": "RDP, Opacus",
    "dp_accounting_rdp": "RDP, dp-accounting",
    "gdp": "GDP",
}


def apart(rows: list[dict[str, Any]], one: str, other: str) -> tuple[float, float]:
    """The least and the largest of `one` over `other`, less one."""
    ratios = [row[one] / row[other] - 1 for row in rows]
    return min(ratios), max(ratios)


def findings(record: dict[str, Any]) -> list[str]:
    """What the record shows, a line each."""
    rows, full, fixed = record["settings"], record["full"], record["fixed"][0]

    def span(one: str, other: str, of: list[dict[str, Any]] = rows) -> str:
        low, high = apart(of, one, other)
        return f"{100 * low:+.2g} % to {100 * high:+.2g} %"

    below = sum(row["gdp"] < row["pld"] for row in rows)
    return [
        f"PRV (Opacus) against PLD (dp-accounting), the same losses composed by different code: {span('prv', 'pld')}.",
        f"RDP against Opacus's on the same orders: {span('rdp', 'opacus_rdp')}. dp-accounting's own against Opacus's: "
        f"{span('dp_accounting_rdp', 'opacus_rdp')}, as its series for fractional orders is a loose bound; ours takes "
        "its whole orders, and the expectation by quadrature for the others.",
        f"PRV against RDP: {span('prv', 'rdp')}; RDP is the looser bound everywhere.",
        f"GDP against PLD: {span('gdp', 'pld')}; it understates in {below} of {len(rows)}, so it keeps no budget here.",
        f"Full batches ({len(full)} settings): the numerical composition against the closed form "
        f"{span('grid', 'closed', full)}, PRV {span('prv', 'closed', full)}.",
        "Fixed-size batches, 100 of 10,000 under replacement, sigma 1, 1,000 steps, delta 1e-5: RDP "
        f"{fixed['sensitivity']:.3f} with the noise over the sensitivity, {fixed['clip']:.2f} with it over the "
        "clipping norm, which is half of that.",
    ]


def tell(record: dict[str, Any]) -> str:
    """The findings, every setting in a table, and what it was measured with."""
    heads = ["sigma", "rate", "steps", "delta", *COLUMNS.values()]
    cells = [
        [
            f"{row['noise_multiplier']:g}", f"{row['sample_rate']:g}", f"{row['steps']:,}", f"{row['delta']:g}",
            *(f"{row[name]:.4g}" for name in COLUMNS),
        ]
        for row in record["settings"]
    ]  # fmt: skip
    versions = record["versions"]
    about = (
        f"dp-accounting {versions['dp-accounting']}, opacus {versions['opacus']}, {record['commit']}, "
        f"{record['date'][:10]}."
    )
    lines = "\n".join(f"- {line}" for line in findings(record))
    return f"{lines}\n\n{markdown(heads, cells)}\n\n{about}"


def section() -> str:
    """All that the record says, or that there is none."""
    return tell(read_json(RECORD)) if RECORD.exists() else "no record yet"


PAGE = Page("robust.experiments.privacy.page", README, "record", section)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
