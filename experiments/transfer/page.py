"""The README's part that is made from the record: ``python -m robust.experiments.transfer.page [--write]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from robust.attacks.transfer.matrix import OTHERS, Cell, TransferTable
from robust.digest import read_json
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.pages import Page
from robust.experiments.transfer.measure import TARGET, merge

FOLDER = Path(__file__).parent
README, RECORD = FOLDER / "README.md", FOLDER / "cifar10.json"
CLAIMED = ("mifgsm", "difgsm", "vmifgsm")


def gains(table: TransferTable, tail: str = "-wide") -> dict[str, bool]:
    """Whether each claimed attack's gain over PGD from ResNet-20 to the ConvNet exceeds the sampling error.

    `tail` is "-wide" for PGD's own step size, "" for the papers' eps / 10.
    """
    cells = {
        name: table.cell(TARGET, "convnet", name + tail) for name in CLAIMED if name + tail in table.attacks
    }
    return {name: cell.gain > cell.gain_error and cell.p < 0.05 for name, cell in cells.items()}


def shares(table: TransferTable, source: str) -> dict[str, float]:
    """By attack, a substitute's transfer to ResNet-20 as a share of the ConvNet's that was trained on the data."""
    rates = {(cell.source, cell.attack): cell.rate for cell in table.cells if cell.target == TARGET}
    return {
        name: rates[source, name] / rates["convnet", name]
        for name in table.attacks
        if (source, name) in rates
    }


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _entry(cell: Cell, first: str) -> str:
    low, high = cell.interval
    text = f"{100 * cell.rate:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    return text if cell.attack == first else f"{text}, {100 * cell.gain:+.1f} ± {100 * cell.gain_error:.1f}"


def matrix(table: TransferTable) -> str:
    """One row an attack and source, one column a target."""
    first, targets = next(iter(table.attacks)), [str(model["name"]) for model in table.models]
    found = {(cell.attack, cell.source, cell.target): cell for cell in table.cells}
    rows = []
    for name in table.attacks:
        for source in table.sources:
            cells = [found.get((name, source, target)) for target in targets]
            if any(cells):
                shown = ["" if cell is None else _entry(cell, first) for cell in cells]
                rows.append([f"`{name}`", "all others" if source == OTHERS else source, *shown])
    return markdown(["attack", "source", *(f"on {target}" for target in targets)], rows)


def claims(table: TransferTable) -> str:
    """What was to be shown, and whether it was."""
    lines = []
    for tail, size in (("-wide", "PGD's step size"), ("", "eps / 10 against PGD's 2.5 eps / 10")):
        for name, holds in gains(table, tail).items():
            cell = table.cell(TARGET, "convnet", name + tail)
            gain = f"{100 * cell.gain:+.1f} ± {100 * cell.gain_error:.1f} points of {cell.n} samples"
            what = f"`{name}` gains over PGD from ResNet-20 to the ConvNet, at {size}"
            lines.append([what, f"{gain}, p = {cell.p:.1g}", "yes" if holds else "**no**"])
    for source, says in (
        ("queried", "from 5,000 queried pairs"),
        ("data-free", "from 5,000 synthetic images"),
    ):
        found = shares(table, source)
        least = min(found, key=found.__getitem__)
        told = ", ".join(f"`{name}` {value:.2f}" for name, value in found.items())
        holds = found[least] >= 0.5
        what = f"a substitute {says} has at least half the ConvNet's transfer to ResNet-20"
        lines.append([what, f"share by attack: {told}", "yes" if holds else "**no**"])
    return markdown(["claim", "measured", "holds"], lines)


def substitutes(record: dict[str, Any]) -> str:
    """One row a substitute: what it was asked, and how well it agrees."""
    rows = [
        [name, told["pool"], str(told["queries"]), _percent(told["agreement"]), f"{told['seconds']:.0f}"]
        for name, told in record["substitutes"].items()
    ]
    heads = ["substitute", "pool", "queries", "agreement on 1,000 of its pairs", "seconds"]
    return markdown(heads, rows)


def cost(record: dict[str, Any]) -> str:
    """What transfer takes of the suite `full`."""
    full = record["full"]
    seconds = full["seconds"]
    ours, whole = seconds.get("prepare", 0.0) + seconds.get("surrogate", 0.0), sum(seconds.values())
    return (
        f"Of the suite `full` on {full['model']} ({full['n']} samples, linf {full['eps']:g}, "
        f"{_percent(full['robust_accuracy'])} survive) transfer takes {_percent(ours / whole)} of {whole:.0f} s, "
        f"most of it to distil the substitute ({seconds.get('prepare', 0.0):.1f} s), which no sample adds to."
    )


def section() -> str:
    """All that the record says."""
    record = read_json(RECORD)
    table = merge(record["parts"])
    part = next(iter(record["parts"].values()))
    accuracy = ", ".join(f"{model['name']} {_percent(model['accuracy'])}" for model in table.models)
    when = f"Code of {part['commit']}, {part['date'][:10]}."
    about = f"{table.n} test images, clean accuracy: {accuracy}. {when}"
    return "\n\n".join(
        (claims(table), about, substitutes(record), cost(record), "![matrix](cifar10.svg)", matrix(table))
    )


PAGE = Page("robust.experiments.transfer.page", README, "record", section)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
