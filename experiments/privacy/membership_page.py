"""The README's part on membership: ``python -m robust.experiments.privacy.membership_page [--write]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust.digest import read_json
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.pages import Page

FOLDER = Path(__file__).parent
README, RECORD = FOLDER / "README.md", FOLDER / "membership.json"


def rate(record: Mapping[str, Any], kind: str, name: str, at: str = "0.01") -> float:
    """The true-positive rate of an attack on the "plain" or the "private" target."""
    return float(attack(record, kind, name)["tpr"][at]["fraction"])


def attack(record: Mapping[str, Any], kind: str, name: str) -> Mapping[str, Any]:
    """What the record says of an attack."""
    found: Mapping[str, Any] = next(row for row in record[kind]["attacks"] if row["name"] == name)
    return found


def findings(record: Mapping[str, Any]) -> list[str]:
    """What the record shows, a line each."""
    plain, hidden = record["plain"], record["private"]
    gain = rate(record, "plain", "lira-online") / max(rate(record, "plain", "loss"), 1e-9)
    two = {name: attack(record, "plain", f"{name} of 2") for name in ("rmia", "lira-online", "lira-offline")}
    told = ", ".join(f"{name} {_cell(row)}, AUC {row['auc']:.3f}" for name, row in two.items())
    above = [row["name"] for row in hidden["attacks"] if not row["at_chance"]]
    right, other = (
        f"{100 * part['accuracy']['members']:.0f} % and {100 * part['accuracy']['others']:.0f} %"
        for part in (plain, hidden)
    )
    return [
        f"{plain['references']['count']} reference models, the target, answers and attacks: "
        f"{plain['seconds'] / 60:.1f} minutes with {record['threads']} threads ({record['device']['name']}).",
        f"LiRA finds {gain:.1f} times the members that the loss threshold finds at 1 % false positives.",
        f"Two reference models, members found at 1 %: {told}.",
        f"Right on members and others: {right} plain, {other} at epsilon {hidden['epsilon']:.2f}, delta "
        f"{hidden['delta']:g} (noise {hidden['noise_multiplier']:.2f}, {hidden['steps']} steps).",
        f"The private models are trained on {hidden['trained_on']:,} images each, and attacked on "
        f"{hidden['attacked']:,}; with {hidden['shadows']} reference models trained the same way, "
        + ("no attack is above chance." if not above else f"above chance: {', '.join(above)}."),
    ]


def _cell(row: Mapping[str, Any] | None, at: str = "0.01") -> str:
    if row is None:
        return ""
    told = row["tpr"][at]
    low, high = told["interval"]
    return f"{100 * told['fraction']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def _area(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['auc']:.3f} ({row['interval'][0]:.3f} to {row['interval'][1]:.3f})"


def tell(record: Mapping[str, Any]) -> str:
    """The findings, a table of all attacks, and what it was measured with."""
    hidden = {row["name"]: row for row in record["private"]["attacks"]}
    heads = ["attack", "0.1 %", "1 % (95 %)", "AUC (95 %)", "private: 1 % (95 %)", "private: AUC (95 %)"]
    cells = [
        [
            row["name"], f"{100 * row['tpr']['0.001']['fraction']:.1f} %", _cell(row), _area(row),
            _cell(hidden.get(row["name"])), _area(hidden.get(row["name"])),
        ]
        for row in record["plain"]["attacks"]
    ]  # fmt: skip
    lines = "\n".join(f"- {line}" for line in findings(record))
    about = f"torch {record['versions']['torch']}, {record['commit']}, {record['date'][:10]}."
    return f"{lines}\n\n{markdown(heads, cells)}\n\n{about}"


def section() -> str:
    """All that the record says, or that there is none."""
    return tell(read_json(RECORD)) if RECORD.exists() else "no record yet"


PAGE = Page("robust.experiments.privacy.membership_page", README, "membership", section)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
