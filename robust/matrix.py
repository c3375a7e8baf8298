"""The matrix: many models and defences against many attacks, every cell with its own stored evidence.

Rows are classifiers, defended or not; columns are suites of `evaluate`, and `patch`. A cell of a suite is a verdict in
a run folder of its own, attacked as the row's defences declare, and can be resumed and verified as every other one. A
cell of `patch` is a universal patch that was learnt on the row itself (`robust.matrix_patch`). All cells are about the
same samples, so that the worst case of a row is taken sample by sample.

A verdict on a defended model also counts what attacks broke that do not know of the defence, points of PGD on the
undefended model among them, whatever the suite. `alone` is what the suite's own attacks leave.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust.adaptive import KINDS
from robust.claim import claiming
from robust.classifier import Classifier
from robust.conditions import conditions
from robust.data import Data
from robust.defense import describe
from robust.digest import data_digest, read_json, sample_digest, write_json
from robust.errors import ConfigError, RobustError, RunError
from robust.evaluate import evaluate
from robust.matrix_patch import PatchSettings, measure_patch, verify_patch
from robust.plan import make_plan
from robust.registry import room
from robust.suites import stages
from robust.threat import Threat
from robust.verdict import Verdict

if TYPE_CHECKING:
    from robust.universal import Outcome

SCHEMA = 1
PATCH = "patch"
COLUMNS = ("quick", "standard", PATCH, "transfer")
CELLS = "cells"
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Row:
    """A classifier of the matrix.

    Attributes:
        name: what the table calls it.
        model: defended or not; rows may share one.
        arguments: of `robust eval`, that name it and its data, for the manifests of its cells; () if there are none.
    """

    name: str
    model: Classifier
    arguments: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """What all cells share.

    Attributes:
        data: the samples that every cell is about; learn: others, which patches are learnt from.
        threat: of the suites, one radius.
        columns: suites or attacks as `evaluate` takes them, and `PATCH`.
        surrogates: what suites that transfer craft on; a substitute is distilled where there are none.
        seed, precision: as in `evaluate`.
        patch: how patches are learnt.
    """

    data: Data
    threat: Threat
    learn: Data | None = None
    columns: tuple[str, ...] = COLUMNS
    surrogates: tuple[Classifier, ...] = ()
    seed: int = 0
    precision: Any = "auto"
    patch: PatchSettings = field(default_factory=PatchSettings)

    def transfers(self, column: str) -> bool:
        """Whether a column takes the surrogates."""
        return column != PATCH and uses_surrogates(column, self.threat.norm)

    def crafted_on(self, column: str) -> tuple[Classifier, ...]:
        """The surrogates that a column takes."""
        return self.surrogates if self.transfers(column) else ()


def uses_surrogates(suite: str, norm: str) -> bool:
    """Whether an attack of a suite crafts on other models."""
    planned = stages(suite, norm)[1]
    return any(room("attacks").load(stage.attack).knowledge == "transfer" for stage in planned)


def check(rows: Sequence[Row], setup: Setup) -> None:
    """Refuses, before anything is written, what some cell could not be measured on; see `measure` for the errors."""
    _check_names([row.name for row in rows], setup)
    if setup.surrogates and not any(setup.transfers(column) for column in setup.columns):
        raise ConfigError("no column uses surrogates; they are for suite transfer or full")
    for row in rows:
        for column in setup.columns:
            try:
                if column == PATCH:
                    setup.patch.check(row.model, setup.data, setup.learn)
                    continue
                make_plan(
                    row.model, setup.data, setup.threat, column, setup.seed, None, setup.precision,
                    setup.crafted_on(column),
                )  # fmt: skip
            except RobustError as error:
                raise type(error)(f"{row.name}, {column}: {error}") from None


def _check_names(names: Sequence[str], setup: Setup) -> None:
    for what, found in (("row", names), ("column", setup.columns)):
        if not found:
            raise ConfigError(f"a matrix needs at least one {what}")
        for name in found:
            if list(found).count(name) > 1:
                raise ConfigError(f"the {what} {name} is given twice")


@claiming
def measure(
    rows: Sequence[Row],
    setup: Setup,
    out: str | Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures every row under every column and returns the record, JSON-ready.

    Args:
        rows: of the table, with names of their own and one box.
        setup: data, threat, columns and seed.
        out: a new folder, or the one to go on with. The cells lie below its folder `cells`; the record, the picture and
            the page are `robust.report_matrix`'s to write.
        resume: finished cells are kept, a verdict that was cut off goes on where it was; a patch that was cut off is
            learnt again. Rows and columns may be added to what `out` holds.
        progress: called with the fraction done and a line of text.

    Raises:
        RobustError: bad input, in one line; nothing is written then.
    """
    folder, tell = Path(out), progress or _silent
    check_folder(folder, resume)
    check(rows, setup)
    started, places = time.perf_counter(), cell_folders([row.name for row in rows], setup.columns)
    told, total = [], len(rows) * len(setup.columns)
    for k, row in enumerate(rows):
        found: dict[str, dict[str, Any]] = {}
        kept: dict[str, tuple[Tensor, Tensor]] = {}
        for j, column in enumerate(setup.columns):
            place, before = places[row.name, column], k * len(setup.columns) + j

            def hook(
                done: float, text: str, before: int = before, title: str = f"{row.name}, {column}"
            ) -> None:
                tell((before + done) / total, f"{title}: {text}")

            hook(0.0, "begins")
            found[column], kept[column] = _cell(row, column, setup, folder / place, hook)
            found[column]["folder"] = place.as_posix()
        told.append(_row(row, found, kept))
    tell(1.0, "done")
    return _record(told, rows, setup, time.perf_counter() - started)


def check_folder(out: Path, resume: bool) -> None:
    """Refuses a folder that holds something which is not a matrix to go on with."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; a matrix writes a folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / CELLS).is_dir():
        raise RunError(f"{out} already holds something; choose another folder")
    if not resume:
        raise RunError(
            f"{out} already holds a matrix; add --resume to go on with it, or choose another folder"
        )


def cell_folders(rows: Sequence[str], columns: Sequence[str]) -> dict[tuple[str, str], Path]:
    """Where each cell lies below the matrix's folder: by the names, in letters that every file system takes."""
    found: dict[tuple[str, str], Path] = {}
    for row in rows:
        for column in columns:
            place = Path(CELLS) / _slug(row) / _slug(column)
            if place in found.values():
                raise ConfigError(
                    f"{row} and another row, or {column} and another column, are too alike; rename one"
                )
            found[row, column] = place
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.=]+", "-", name).strip("-.") or "-"


def _silent(fraction: float, text: str) -> None:
    """No progress wanted."""


def _cell(
    row: Row, column: str, setup: Setup, place: Path, hook: Progress
) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    """A cell's part of the record, and (correct, robust), each (N,) bool."""
    if column == PATCH:
        summary, outcome = measure_patch(
            row.model, setup.data, setup.learn, setup.patch, place, seed=setup.seed,
            precision=setup.precision, progress=hook,
        )  # fmt: skip
        masks = outcome.clean == outcome.y, outcome.attempted & ~outcome.fooled
        facts = _patch_facts(summary, outcome)
    else:
        verdict = evaluate(
            row.model, setup.data, threat=setup.threat, suite=column, seed=setup.seed, out=place, resume=True,
            precision=setup.precision, surrogates=setup.crafted_on(column), progress=hook,
            command=_command(row, column, setup, place),
        )  # fmt: skip
        masks = verdict.correct, verdict.robust
        facts = _verdict_facts(verdict)
    n, standing = len(masks[0]), int(masks[1].sum())
    return {**_share(standing, n), **facts, **_conditions(place, row.model)}, masks


def _share(count: int, n: int) -> dict[str, Any]:
    from robust.report import clopper_pearson

    low, high = clopper_pearson(count, n)
    return {"accuracy": count / n, "interval": [low, high], "standing": count}


def _verdict_facts(verdict: Verdict) -> dict[str, Any]:
    fell: dict[str, int] = {}
    for name in verdict.broken_by:
        if name is not None:
            fell[name] = fell.get(name, 0) + 1
    unaware = sum(count for name, count in fell.items() if name in KINDS.values())
    return {
        "alone": (int(verdict.robust.sum()) + unaware) / len(verdict),
        "stages": verdict.manifest["suite"]["stages"],
        "broken_by": fell,
        "draws": verdict.manifest["draws"],
        "precision": verdict.manifest["precision"],
        "non_adaptive": verdict.non_adaptive,
        "seconds": verdict.cost["seconds"],
        "warnings": verdict.warnings,
    }


def _patch_facts(summary: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
    return {
        "success_rate": outcome.rate,
        "control": summary["control"]["success_rate"],
        "area": summary["area"],
        "shape": summary["shape"],
        "learnt_on": summary["train"],
        "parameters": summary["parameters"],
        "non_adaptive": None,
        "seconds": summary["seconds"],
        "warnings": summary["warnings"],
    }


def _measured_on(device: torch.device) -> dict[str, Any]:
    """The conditions, with the threads at work."""
    found = conditions(device)
    found["device"]["threads"] = torch.get_num_threads()
    return found


def _conditions(place: Path, model: Classifier) -> dict[str, Any]:
    """The commit, date, versions and device that a cell was finished with, be it in an earlier process."""
    path = place.with_name(f"{place.name}.json")
    if not path.exists():
        write_json(path, _measured_on(model.device))
    return read_json(path)


def _command(row: Row, column: str, setup: Setup, place: Path) -> list[str] | None:
    """The `robust eval` that makes the same verdict."""
    if not row.arguments:
        return None
    return [
        "robust",
        "eval",
        *row.arguments,
        "--suite",
        column,
        "--seed",
        str(setup.seed),
        "--out",
        str(place),
    ]


def _row(
    row: Row, cells: Mapping[str, Mapping[str, Any]], masks: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """A row of the record: its cells, the worst case over them, and what a non-adaptive attack would have claimed."""
    correct = next(iter(masks.values()))[0]
    worst = correct.clone()
    for _, robust in masks.values():
        worst &= robust
    lowest = min(cells, key=lambda column: cells[column]["accuracy"])
    return {
        "name": row.name,
        "model": row.model.digest(),
        "defenses": describe(row.model),
        "randomised": row.model.randomised,
        "clean": _share(int(correct.sum()), len(correct)),
        "cells": dict(cells),
        "worst": {**_share(int(worst.sum()), len(worst)), "column": lowest},
        "overstated": _overstated(cells),
    }


def _overstated(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The non-adaptive number that lies furthest above what its cell found; None without a defence."""
    found = {name: cell["non_adaptive"] for name, cell in cells.items() if cell["non_adaptive"] is not None}
    if not found:
        return None
    column = max(found, key=lambda name: found[name]["overstated"])
    beside = found[column]
    kind = max((kind for kind in ("replay", "naive") if kind in beside), key=lambda kind: beside[kind])
    return {"column": column, "kind": kind, "claimed": beside["claimed"], "by": beside["overstated"]}


def _record(told: list[dict[str, Any]], rows: Sequence[Row], setup: Setup, wall: float) -> dict[str, Any]:
    data = setup.data
    digests = [sample_digest(*data[i]) for i in range(len(data))]
    commits = {cell["commit"] for row in told for cell in row["cells"].values()}
    return {
        "schema": SCHEMA,
        "data": {"name": data.name, "n": len(data), "digest": data_digest(digests)},
        "threat": setup.threat.describe(),
        "seed": setup.seed,
        "columns": list(setup.columns),
        "patch": setup.patch.describe() if PATCH in setup.columns else None,
        "surrogates": [{"name": clf.name, "digest": clf.digest()} for clf in setup.surrogates],
        "rows": told,
        "commits": sorted(commits),
        **_measured_on(rows[0].model.device),
        "seconds": round(sum(cell["seconds"] for row in told for cell in row["cells"].values()), 3),
        "wall_seconds": round(wall, 3),
    }


def verify(rows: Sequence[Row], setup: Setup, out: str | Path) -> dict[str, int]:
    """Re-checks every cell's stored evidence against its model and the data; writes nothing.

    Returns:
        How many cells, adversarial examples and marginal differences there are.

    Raises:
        VerificationError: a cell is not what it says; RunError: one is missing or unfinished.
    """
    _check_names([row.name for row in rows], setup)
    places = cell_folders([row.name for row in rows], setup.columns)
    counts = {"cells": len(places), "examples": 0, "marginal_differences": 0}
    for row in rows:
        for column in setup.columns:
            place = Path(out) / places[row.name, column]
            try:
                if column == PATCH:
                    found = verify_patch(place, row.model, setup.data, setup.patch)
                else:
                    found = Verdict.load(place).verify(row.model, setup.data)
            except RobustError as error:
                raise type(error)(f"{row.name}, {column}: {error}") from error
            counts["examples"] += found["examples"]
            counts["marginal_differences"] += len(found["marginal_differences"])
    return counts
