"""The README's part that is made from the record: ``python -m robust.experiments.certified.page [--write]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from robust.digest import read_json
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.certified.measure import compare
from robust.experiments.pages import Page

FOLDER = Path(__file__).parent
README, RECORD = FOLDER / "README.md", FOLDER / "smoothing.json"


def tell(record: dict[str, Any]) -> str:
    """Both procedures in a table, and what they were measured with."""
    rows = []
    for name in ("fixed", "sequential"):
        one = record[name]
        votes = sum(sample["n"] for sample in one["samples"]) / len(one["samples"])
        cells = [
            f"{100 * row['accuracy']:.1f} % ({100 * row['interval'][0]:.1f} to {100 * row['interval'][1]:.1f})"
            for row in one["certified_accuracy"]
        ]
        rows.append([name, *cells, f"{votes:,.0f}", f"{one['seconds'] / 60:.0f} min"])
    radii = [f"radius {row['radius']:g}" for row in record["fixed"]["certified_accuracy"]]
    table = markdown(["votes", *radii, "mean votes", "time"], rows)
    found = compare(record["fixed"]["samples"], record["sequential"]["samples"])
    lost = ", ".join(f"{count} at radius {radius}" for radius, count in found["lost"].items())
    settings = record["settings"]
    about = (
        f"Sequential votes: {100 * found['share']:.0f} % of the noise samples; samples that only fixed votes certify: "
        f"{lost}. sigma {settings['sigma']}, n0 {settings['n0']}, n {settings['n']:,}, alpha {settings['alpha']}, seed "
        f"{settings['seed']}, {len(record['fixed']['samples'])} images of {record['data']}; voted: "
        f"{', '.join(record['fixed']['voters'])}. {record['device']['name']}, torch {record['versions']['torch']}, "
        f"{record['commit']}, {record['date'][:10]}."
    )
    return f"{table}\n\n{about}"


def section() -> str:
    """All that the record says, or that there is none."""
    return tell(read_json(RECORD)) if RECORD.exists() else "no record yet"


PAGE = Page("robust.experiments.certified.page", README, "record", section)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
