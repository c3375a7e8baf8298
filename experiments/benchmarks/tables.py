"""The README's tables, made from the records: ``python -m robust.experiments.benchmarks.tables [--write]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust.digest import read_json
from robust.errors import RunError
from robust.experiments.benchmarks import REGISTRY
from robust.experiments.benchmarks.harness import RESULTS, SCHEMA
from robust.experiments.pages import Page

README = RESULTS.parent / "README.md"


def read_records(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The records in a folder by their stems, sorted.

    Raises:
        RunError: a file is no record of this version.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        record = read_json(path)
        if record.get("schema") != SCHEMA or record.get("benchmark") not in REGISTRY:
            raise RunError(f"{path} is no record of a benchmark of this version")
        found[path.stem] = record
    return found


def title(record: Mapping[str, Any]) -> str:
    """What was measured, where and at which commit, in a line."""
    settings, device = record["settings"], record["device"]
    parts = [str(settings[key]) for key in ("model", "data") if settings.get(key)]
    samples = record.get("model", {}).get("n")
    parts += [f"{samples:,} samples", f"linf {255 * settings['eps']:.3g}/255"] if samples else []
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    parts += [device["name"] if device["type"] != "cpu" else f"{device['name']}, {threads}"]
    parts += [f"torch {record['versions']['torch']}", record["commit"], record["date"][:10]]
    return ", ".join(parts)


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as GitHub shows it."""
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def section(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of all benchmarks, those without a record included."""
    blocks = []
    for name in REGISTRY:
        benchmark = REGISTRY.load(name)()
        own = {stem: record for stem, record in records.items() if record["benchmark"] == name}
        blocks.append(f"### {name}")
        if not own:
            blocks.append("no record yet")
        for stem, record in own.items():
            blocks += [f"`{stem}`: {title(record)}", markdown(*benchmark.table(record))]
            blocks += [f"- {line}" for line in record.get("skipped", {}).values()]
    return "\n\n".join(blocks)


PAGE = Page("robust.experiments.benchmarks.tables", README, "tables", lambda: section(read_records()))

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
