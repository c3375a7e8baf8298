"""Makes a record of a finished run: ``python -m robust.experiments.verdicts.record RUN OUT.json [COMMIT]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from robust.conditions import commit_of
from robust.digest import read_json, write_json
from robust.errors import RobustError

# What a reader needs to judge or repeat the number; the command and the paths of the machine stay behind.
KEPT = (
    "schema",
    "model",
    "threat",
    "suite",
    "seed",
    "results",
    "stages",
    "cost",
    "precision",
    "versions",
    "device",
    "started",
    "finished",
    "warnings",
)


def make_record(run: Path, commit: str) -> dict[str, Any]:
    """The record of the run folder `run`, made by the code at `commit`."""
    manifest = read_json(run / "manifest.json")
    data = {key: manifest["data"][key] for key in ("name", "n", "shape", "digest")}
    return {"commit": commit, "data": data, **{key: manifest[key] for key in KEPT}}


def main(arguments: list[str]) -> int:
    """RUN OUT [COMMIT]: writes the record; the commit of this checkout where none is given."""
    if len(arguments) not in (2, 3):
        print("usage: python -m robust.experiments.verdicts.record RUN OUT.json [COMMIT]", file=sys.stderr)
        return 2
    commit = arguments[2] if len(arguments) == 3 else commit_of(Path(__file__).parent)
    try:
        write_json(Path(arguments[1]), make_record(Path(arguments[0]), commit))
    except RobustError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
