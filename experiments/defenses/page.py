"""The README's parts that are made from records: ``python -m robust.experiments.defenses.page [--write]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from robust.digest import read_json, write_atomic
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.defenses.matrix import RECORD as MATRIX_RECORD
from robust.experiments.pages import Page
from robust.report import clopper_pearson, told_defense
from robust.report_matrix import entries, head_text, heads, heat_map, overstatement, title

FOLDER = Path(__file__).parent
README, RECORD = FOLDER / "README.md", FOLDER / "resnet20.json"
MATRIX_FIGURE = "matrix.svg"
LEAST_CLEAN, MOST_ROBUST = 0.7, 0.03


def holds(case: dict[str, Any]) -> bool:
    """Whether a transform keeps enough clean accuracy, and adaptive attacks leave next to none of it."""
    return bool(case["clean_accuracy"] >= LEAST_CLEAN and case["adaptive_accuracy"] < MOST_ROBUST)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def _row(name: str, case: dict[str, Any]) -> list[str]:
    beside, n = case["non_adaptive"], case["n"]
    high = clopper_pearson(round(case["adaptive_accuracy"] * n), n)[1]
    told = [told_defense(item) for item in case["defenses"]]
    return [
        name,
        ", ".join(line.partition(", attacked by ")[0].partition("(")[2].rstrip(")") for line in told),
        " + ".join(dict.fromkeys(line.partition(", attacked by ")[2] for line in told)),
        _percent(case["clean_accuracy"]),
        str(n),
        f"{_percent(case['adaptive_accuracy'])} (at most {_percent(high)})",
        _percent(beside["replay"]),
        _percent(beside.get("naive")),
        f"{100 * beside['overstated']:.1f} points",
        "yes" if holds(case) else "**no**",
    ]


def _stages(case: dict[str, Any]) -> str:
    return ", ".join(
        f"`{stage['attack']}` ("
        + " ".join(f"{key}={value}" for key, value in stage.items() if key != "attack")
        + ")"
        for stage in case["stages"]
    )


def section() -> str:
    """All that the record says."""
    cases = read_json(RECORD)["cases"]
    first = next(iter(cases.values()))
    heads = [
        "transform",
        "parameters",
        "attacked by",
        "clean",
        "n",
        "adaptive",
        "replay",
        "naive",
        "overstated by",
        "holds",
    ]
    table = markdown(heads, [_row(name, case) for name, case in cases.items()])
    suites = {case["suite"]: _stages(case) for case in cases.values()}
    told = "; ".join(f"`{name}`: {stages}" for name, stages in suites.items())
    device, minutes = first["device"]["name"], sum(case["seconds"] for case in cases.values()) / 60
    commits = sorted({f"{case['commit']}, {case['date'][:10]}" for case in cases.values()})
    about = (
        f"Suites: {told}. Linf 8/255, seed {first['seed']}. {device}, torch {first['versions']['torch']}, "
        f"{minutes:.0f} minutes on one core beside other work. Code of {' and '.join(commits)}."
    )
    return f"{table}\n\n{about}"


def matrix_section() -> str:
    """The table, the picture and the conditions of the matrix; one line while there is none."""
    if not MATRIX_RECORD.exists():
        return "No record yet: the command above makes it, in some hours of two cores."
    record = read_json(MATRIX_RECORD)
    rows = []
    for row in record["rows"]:
        shown = [_cell(entry.accuracy, entry.alone) for entry in entries(record, row).values()]
        if row["overstated"]:
            shown[-1] += f" ({overstatement(row['overstated'])})"
        rows.append([row["name"], *shown])
    table = markdown(["accuracy left", *map(head_text, heads(record))], rows)
    surrogates = (
        ", ".join(item["name"] for item in record["surrogates"]) or "a substitute distilled from each row"
    )
    about = (
        f"{title(record)}, seed {record['seed']}. Transfer from {surrogates}. {record['device']['name']}, torch "
        f"{record['versions']['torch']}, {record['seconds'] / 60:.0f} minutes beside other work. Code of "
        f"{', '.join(record['commits'])}, {record['date'][:10]}."
    )
    return f"{table}\n\n![the matrix as a heat map]({MATRIX_FIGURE})\n\n{about}"


def _cell(accuracy: float | None, alone: float | None) -> str:
    return _percent(accuracy) + ("" if alone is None else f", alone {_percent(alone)}")


def draw_matrix() -> None:
    """The heat map beside the page, where there is a record."""
    if MATRIX_RECORD.exists():
        write_atomic(FOLDER / MATRIX_FIGURE, heat_map(read_json(MATRIX_RECORD)))


PAGE = Page("robust.experiments.defenses.page", README, "record", section)
MATRIX = Page("robust.experiments.defenses.page", README, "matrix", matrix_section, draw_matrix)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]) or MATRIX.main(sys.argv[1:]))
