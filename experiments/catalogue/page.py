"""The README's part that is made from the records: ``python -m robust.experiments.catalogue.page [--write]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust.digest import read_json
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.pages import Page

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
_ABOUT = ("claim", "holds", "seconds", "commit", "date", "device", "versions")


def points_table(record: Mapping[str, Any]) -> str:
    """One row per point: the claim, what was measured, and whether it holds."""
    rows = []
    for name, facts in record["points"].items():
        measured = ", ".join(f"{key} {_number(value)}" for key, value in facts.items() if key not in _ABOUT)
        rows.append(
            [f"`{name}`", facts["claim"], measured, "yes" if facts["holds"] else "**no**", facts["commit"]]
        )
    subject = record["subject"]
    about = (
        f"{subject['model']}, the {subject['correct']} of {subject['n']} samples that it classifies correctly"
    )
    return f"{about}; medians:\n\n" + markdown(["point", "claim", "measured", "holds", "commit"], rows)


def curves_table(record: Mapping[str, Any]) -> str:
    """One row per black-box attack: success or distance at some numbers of queries."""
    wanted = [q for q in (10, 100, 300, 1000, 3000) if q <= record["queries"]]
    blocks = []
    for panel in record["panels"]:
        fixed = panel["eps"] is not None
        radius = f" {255 * panel['eps']:.3g}/255" if fixed and panel["norm"] == "linf" else ""
        radius = f" {panel['eps']:.3g}" if fixed and panel["norm"] != "linf" else radius
        what = f"share broken within {panel['norm']}{radius}" if fixed else f"median {panel['norm']}"
        rows = []
        for name, curve in panel["curves"].items():
            at = [max(k for k, q in enumerate(curve["queries"]) if q <= limit) for limit in wanted]
            values = curve["success" if fixed else "distance"]
            rows.append([f"`{name}`", *(_number(values[k]) for k in at)])
        heads = [f"{panel['knowledge']}-based, {what} at queries", *map(str, wanted)]
        blocks.append(markdown(heads, rows))
    subject = record["subject"]
    about = (
        f"{subject['model']}, {subject['correct']} correct samples, {record['commit']}, {record['date'][:10]}"
    )
    return f"{about}:\n\n![curves](curves.svg)\n\n" + "\n\n".join(blocks)


def masked_table(record: Mapping[str, Any]) -> str:
    """One row per mask: what each suite leaves, and what the verdict of the gradients alone doubts."""
    suites = list(next(iter(record["masks"].values())))
    rows = []
    for name, found in record["masks"].items():
        left = [f"{one['robust_accuracy']:.0%}" for one in found.values()]
        clean = f"{found[suites[0]]['clean_accuracy']:.0%}"
        rows.append([name, clean, *left, "; ".join(found[suites[0]]["warnings"]) or "none"])
    heads = ["ResNet-20", "clean", *(f"`{suite}`" for suite in suites), f"doubts of `{suites[0]}`"]
    about = (
        f"{record['subject']['model']}, {record['subject']['n']} samples, linf {255 * record['eps']:.3g}/255, "
        f"{record['commit']}, {record['date']}: accuracy left by each suite"
    )
    return f"{about}.\n\n" + markdown(heads, rows)


def _number(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def section() -> str:
    """All that the records say."""
    blocks = []
    for heading, stem, table in (
        ("The papers' points", "points", points_table),
        ("Masked gradients", "masked", masked_table),
        ("Curves against queries", "curves", curves_table),
    ):
        place = FOLDER / f"{stem}.json"
        body = table(read_json(place)) if place.exists() else "no record yet"
        blocks.append(f"## {heading}\n\n{body}")
    return "\n\n".join(blocks)


PAGE = Page("robust.experiments.catalogue.page", README, "records", section)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
