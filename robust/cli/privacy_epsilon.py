"""`robust privacy epsilon`: what a private training costs by every accountant, or what a budget allows."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from robust.cli import options
from robust.errors import ConfigError, RobustError
from robust.registry import Registry, room

Noise = Annotated[
    str | None,
    typer.Option(
        "--noise-multiplier",
        metavar="SIGMA",
        help="The noise's standard deviation; see --noise-over.",
        show_default=False,
    ),
]
Rate = Annotated[
    str | None,
    typer.Option(
        "--sample-rate", metavar="Q", help="Batch over records, such as 256/60000.", show_default=False
    ),
]
Steps = Annotated[
    int | None, typer.Option("--steps", metavar="N", help="How many steps.", show_default=False)
]
Delta = Annotated[str, typer.Option("--delta", metavar="DELTA", help="A probability well below 1 / records.")]
Sampling = Annotated[
    str,
    typer.Option(
        "--sampling",
        metavar="SCHEME",
        help="poisson; fixed (fixed-size batches drawn afresh each step); shuffled (epochs, no amplification).",
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Option(
        "--accountant",
        metavar="NAME",
        help="May be repeated. Default: all that can serve.",
        show_default=False,
    ),
]
NoiseOver = Annotated[
    str,
    typer.Option(
        "--noise-over",
        metavar="UNIT",
        help="What SIGMA multiplies: sensitivity, or clip (the norm). They differ for fixed batches only.",
    ),
]
CountNoise = Annotated[
    str | None,
    typer.Option(
        "--count-noise",
        metavar="SIGMA",
        help="Deviation of the noise on the count that adaptive clipping releases too.",
        show_default=False,
    ),
]
Phases = Annotated[
    list[str] | None,
    typer.Option(
        "--phase",
        metavar="SIGMA:Q:N",
        help="One phase of a schedule, in place of noise, rate and steps; may be repeated.",
        show_default=False,
    ),
]
LedgerFile = Annotated[
    Path | None,
    typer.Option(
        "--ledger", metavar="FILE", help="What this ledger says was spent, first.", show_default=False
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target-epsilon",
        metavar="EPSILON",
        help="A budget: finds the one of noise, rate and steps that is left out.",
        show_default=False,
    ),
]


def privacy_epsilon(
    noise_multiplier: Noise = None,
    sample_rate: Rate = None,
    steps: Steps = None,
    delta: Delta = "1e-5",
    sampling: Sampling = "poisson",
    accountant: Names = None,
    noise_over: NoiseOver = "sensitivity",
    count_noise: CountNoise = None,
    phase: Phases = None,
    ledger: LedgerFile = None,
    target_epsilon: Target = None,
    as_json: options.Json = False,
) -> None:
    """What a private training costs by every accountant, with its assumptions, or what a budget allows."""
    tools = room("defenses.privacy")
    unit = {
        "sampling": sampling,
        "noise_over": noise_over,
        "count_noise": _number(count_noise, "--count-noise"),
    }
    given: dict[str, Any] = {
        "noise_multiplier": _number(noise_multiplier, "--noise-multiplier"),
        "sample_rate": _number(sample_rate, "--sample-rate"),
        "steps": steps,
    }
    chance = options.number(delta, "--delta")
    spent = tools.load("read-ledger")(ledger) if ledger is not None else []
    spent += [_phase(text, unit, tools) for text in phase or []]
    found: dict[str, Any] = {}
    if target_epsilon is not None:
        target = options.number(target_epsilon, "--target-epsilon")
        name = _calibrating(accountant, sampling)
        solved = tools.load("calibrate")(
            target_epsilon=target, delta=chance, accountant=name, before=spent, **given, **unit
        )
        found = {"target_epsilon": target, "by": name, "solved": solved.solved, "value": solved.value}
        given[solved.solved] = solved.value if solved.solved != "steps" else solved.steps
        spent = [*spent, tools.load("phase")(solved.mechanism, solved.steps, True)]
    elif all(value is not None for value in given.values()):
        mechanism = tools.load("mechanism")(
            noise_multiplier=given["noise_multiplier"], sample_rate=given["sample_rate"], **unit
        )
        spent = [*spent, tools.load("phase")(mechanism, given["steps"], True)]
    elif any(value is not None for value in given.values()) or not (phase or ledger):
        lacking = ", ".join(f"--{name.replace('_', '-')}" for name, value in given.items() if value is None)
        raise ConfigError(f"{lacking}: missing; give all three, or two of them and --target-epsilon")
    rows, refused = _account(spent, chance, accountant, tools)
    if as_json:
        shown = {name: "inf" if value == math.inf else value for name, value in given.items()}
        told = {**found, **shown, "epsilons": [row.to_dict() for row in rows], "refused": refused}
        print(json.dumps(told, ensure_ascii=False, allow_nan=False))
    else:
        _show(rows, refused, found)


def _number(text: str | None, option: str) -> float | None:
    return None if text is None else options.number(text, option)


def _phase(text: str, unit: dict[str, Any], tools: Registry) -> Any:
    """A phase of the form SIGMA:Q:N."""
    parts = text.split(":")
    if len(parts) != 3 or not parts[2].strip().isdigit():
        raise ConfigError(f"--phase: {text!r} is no phase; write noise:rate:steps such as 1.0:256/60000:1000")
    noise, rate = (options.number(part, "--phase") for part in parts[:2])
    return tools.load("phase")(
        tools.load("mechanism")(noise_multiplier=noise, sample_rate=rate, **unit), int(parts[2])
    )


def _calibrating(names: Sequence[str] | None, sampling: str) -> str:
    """The accountant that a budget is kept by: the one named, or the default of the sampling scheme."""
    if names:
        return names[0]
    accountants = room("defenses.privacy.accountants")
    served = (name for name in accountants if sampling in accountants.load(name).samplings)
    return next(served, "pld")


def _account(
    phases: Sequence[Any], delta: float, names: Sequence[str] | None, tools: Registry
) -> tuple[list[Any], dict[str, str]]:
    """An epsilon by every accountant, and why the others have none; one that was asked for by name must have one."""
    rows: list[Any] = []
    refused: dict[str, str] = {}
    for name in names or room("defenses.privacy.accountants"):
        try:
            rows.append(tools.load("spent")(phases, delta=delta, accountant=name))
        except RobustError as error:
            if names:
                raise
            refused[name] = str(error)
    if not rows:
        raise ConfigError(next(iter(refused.values())))
    return rows, refused


def _show(rows: Sequence[Any], refused: dict[str, str], found: dict[str, Any]) -> None:
    """A table, then the assumptions: what all share once, and each accountant's own."""
    from rich import box
    from rich.table import Table

    if found:
        what = found["solved"].replace("_", " ")
        print(f"{what} {found['value']:.6g} keeps epsilon {found['target_epsilon']:g} by {found['by']}")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("accountant", "epsilon", "delta", "number"):
        table.add_column(column, justify="right" if column in ("epsilon", "delta") else "left")
    for row in rows:
        value = f"{float(row):.4g}" if math.isfinite(row) else "infinite"
        kind = "upper bound" if row.about.guaranteed else "approximation"
        table.add_row(row.about.accountant, value, f"{row.about.delta:g}", kind)
    options.print_table(table)
    shared = [
        line for line in rows[0].about.assumptions if all(line in row.about.assumptions for row in rows)
    ]
    for line in shared:
        print(f"- {line}")
    for row in rows:
        own = [line for line in row.about.assumptions if line not in shared]
        print(
            f"- {row.about.accountant}: {'; '.join(line.removeprefix('accountant: ') for line in own)}"
            if own
            else ""
        )
    for line in refused.values():
        print(f"- none by {line.removeprefix('accountant ')}")
