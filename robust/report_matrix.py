"""A matrix on paper: the heat map with its numbers, and the page that links every cell to its own report."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from robust.digest import write_atomic, write_json
from robust.report import clopper_pearson, count, percent, told_defense
from robust.report_figures import eps_text

RECORD, FIGURE, PAGE = "matrix.json", "matrix.svg", "matrix.html"
CLEAN, WORST, CLAIMED = "clean", "worst", "claimed"
_NAMED = 4  # cells that a doubt names before it counts them
_HEADS = {WORST: "worst of all", CLAIMED: "non-adaptive claim"}


@dataclass(frozen=True)
class Entry:
    """One number of the table.

    Attributes:
        accuracy: a fraction; None where there is nothing to tell.
        interval: its 95 % interval, or None.
        alone: what the column's own attacks leave, where attacks that do not know of a defence broke more.
        note: what else is to be said of it. folder: of its evidence, below the matrix's.
    """

    accuracy: float | None
    interval: tuple[float, float] | None = None
    note: str = ""
    folder: str | None = None
    alone: float | None = None


def heads(record: Mapping[str, Any]) -> list[str]:
    """The table's columns: clean, the attacks, worst of all, and what non-adaptive attacks claim, if any row has it."""
    claimed = [CLAIMED] if any(row["overstated"] for row in record["rows"]) else []
    return [CLEAN, *record["columns"], WORST, *claimed]


def head_text(head: str) -> str:
    """A column's name as people read it."""
    return _HEADS.get(head, head.replace(",", ", "))


def entries(record: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Entry]:
    """A row's numbers by `heads`."""
    found = {CLEAN: _entry(row["clean"])}
    for name, cell in row["cells"].items():
        found[name] = _entry(cell, folder=cell["folder"])
    found[WORST] = _entry(row["worst"])
    told = row["overstated"]
    found[CLAIMED] = Entry(None) if told is None else Entry(told["claimed"], None, overstatement(told))
    return {head: found[head] for head in heads(record)}


def _entry(share: Mapping[str, Any], folder: str | None = None) -> Entry:
    low, high = share["interval"]
    alone = share.get("alone", share["accuracy"])
    return Entry(share["accuracy"], (low, high), "", folder, None if alone == share["accuracy"] else alone)


def overstatement(told: Mapping[str, Any]) -> str:
    """By how much a non-adaptive attack overstated, and which one where."""
    return f"{told['kind']}, {100 * told['by']:+.1f} points over {told['column']}"


def heat_map(record: Mapping[str, Any]) -> bytes:
    """An SVG of the record of `robust.matrix.measure`: accuracy left, in percent, one number a cell.

    The same record gives the same bytes.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns, rows = heads(record), record["rows"]
    table = [entries(record, row) for row in rows]
    values = [[_value(line[head]) for head in columns] for line in table]
    longest = max(len(row["name"]) for row in rows)
    size = (1.0 + 0.068 * longest + 0.82 * len(columns), 1.35 + 0.36 * len(rows))
    with mpl.rc_context({"svg.hashsalt": "matrix", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axes.set_title(title(record), fontsize=9, loc="left")
        axes.set_xticks(
            range(len(columns)),
            [head_text(head).replace("non-adaptive ", "non-adaptive\n") for head in columns],
        )
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axes.tick_params(length=0)
        axes.xaxis.set_ticks_position("top")
        axes.spines[:].set_visible(False)
        for k in range(1, len(rows)):
            axes.axhline(k - 0.5, color="white", linewidth=1)
        for k in range(1, len(columns)):  # what is no attack stands apart
            apart = columns[k - 1] == CLEAN or columns[k] in (WORST, CLAIMED)
            axes.axvline(k - 0.5, color="white", linewidth=5 if apart else 1)
        _write_numbers(axes, columns, table)
        bar = figure.colorbar(image, ax=axes, label="accuracy left, %", aspect=30, pad=0.015)
        bar.outline.set_visible(False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _write_numbers(axes: Any, columns: Sequence[str], table: Sequence[Mapping[str, Entry]]) -> None:
    """Each cell's number, below it what its column's own attacks leave, where that is more."""
    for i, line in enumerate(table):
        for j, head in enumerate(columns):
            entry = line[head]
            if entry.accuracy is None:
                continue
            colour = "black" if entry.accuracy > 0.6 else "white"
            weight = "bold" if head == WORST else "normal"
            number = number_text(entry.accuracy)
            place = -0.13 if entry.alone is not None else 0
            axes.text(j, i + place, number, ha="center", va="center", color=colour, fontweight=weight)
            if entry.alone is not None:
                alone = f"alone {number_text(entry.alone)}"
                axes.text(j, i + 0.27, alone, ha="center", va="center", color=colour, fontsize=6)


def _value(entry: Entry) -> float:
    return math.nan if entry.accuracy is None else 100 * entry.accuracy


def number_text(accuracy: float) -> str:
    """Percent with one decimal, and none where it says nothing."""
    return f"{100 * accuracy:.1f}".removesuffix(".0")


def title(record: Mapping[str, Any]) -> str:
    """What was measured, in one line."""
    threat = record["threat"]
    patch = (
        ""
        if record["patch"] is None
        else f", patch of up to {100 * record['patch']['share']:g} % of the area"
    )
    return f"{record['data']['name']}: {record['data']['n']} samples, {threat['norm']} {eps_text(threat['eps'])}{patch}"


def write_matrix(record: Mapping[str, Any], out: Path) -> None:
    """Writes the record, the picture, and the page that shows both and links to the cells' reports."""
    out.mkdir(parents=True, exist_ok=True)
    cells = [cell for row in record["rows"] for cell in row["cells"].values()]
    links = {cell["folder"]: f"{cell['folder']}/report.html" for cell in cells}
    write_atomic(out / FIGURE, heat_map(record))
    write_atomic(out / PAGE, page(record, links).encode())
    write_json(out / RECORD, record)


def page(record: Mapping[str, Any], links: Mapping[str, str]) -> str:
    """The page, self-contained but for its links to the cells' own reports."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, count=count, eps=eps_text, head=head_text, number=number_text)
    svg = heat_map(record).decode()
    lines = [(row, entries(record, row)) for row in record["rows"]]
    return environment.get_template("matrix.html.j2").render(
        record=record,
        title=title(record),
        zero_high=clopper_pearson(0, record["data"]["n"])[1],
        heads=heads(record),
        rows=lines,
        some_alone=any(entry.alone is not None for _, line in lines for entry in line.values()),
        links=links,
        picture=svg[svg.index("<svg") :],
        defenses=_shields(record),
        doubts=_doubts(record),
        stages=_stages(record),
        facts=_facts(record),
        stored=json.dumps(record, indent=2, ensure_ascii=False),
    )


def _shields(record: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """The defences of every row that has some, in words."""
    return [
        (row["name"], [told_defense(item) for item in row["defenses"]])
        for row in record["rows"]
        if row["defenses"]
    ]


def _doubts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every doubt once, with the cells that raised it."""
    found: dict[str, list[str]] = {}
    for row in record["rows"]:
        for column, cell in row["cells"].items():
            for line in cell["warnings"]:
                found.setdefault(line, []).append(f"{row['name']} ({column})")
    return [
        (line, ", ".join(cells) if len(cells) <= _NAMED else f"{len(cells)} cells")
        for line, cells in found.items()
    ]


def _stages(record: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What ran under each column's name, in every way that it was adapted to a row."""
    found: dict[str, dict[str, None]] = {column: {} for column in record["columns"]}
    for row in record["rows"]:
        for column, cell in row["cells"].items():
            found[column][_told(cell)] = None
    return [(column, list(texts)) for column, texts in found.items()]


def _told(cell: Mapping[str, Any]) -> str:
    if "stages" not in cell:
        settings = ", ".join(f"{key}={value}" for key, value in cell["parameters"].items())
        height, width = cell["shape"]
        size = f"{height:.4g} × {width:.4g} pixels, {percent(cell['area'])} of the area"
        return f"one patch of {size}, learnt on {cell['learnt_on']} other samples ({settings})"
    return "; ".join(_stage(stage) for stage in cell["stages"])


def _stage(stage: Mapping[str, Any]) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in stage.items() if key != "attack")
    return f"{stage['attack']} ({settings})" if settings else str(stage["attack"])


def _facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions as (name, value)."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    device = record["device"]
    surrogates = ", ".join(item["name"] for item in record["surrogates"])
    facts = [
        ("commit", ", ".join(record["commits"])),
        ("versions", versions),
        ("device", f"{device['name']} ({device['type']}), {device['threads']} threads"),
        ("date", record["date"]),
        ("seconds of all cells", count(record["seconds"])),
        ("seed", str(record["seed"])),
        ("data digest", record["data"]["digest"]),
        ("surrogates", surrogates or "none: a substitute is distilled where one is needed"),
    ]
    return [*facts, *([("command", record["command"])] if record.get("command") else [])]
