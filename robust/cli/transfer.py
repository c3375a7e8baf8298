"""`robust transfer`: which model's adversarial points fool which other, as a table, JSON and a heat map."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from robust.cli import options
from robust.cli.progress import Meter
from robust.errors import ConfigError, RunError, ThreatError
from robust.models.named import FORM, NamedModel, parse_model
from robust.registry import room, unknown

if TYPE_CHECKING:
    from robust.classifier import Classifier

FUSED = ("logits", "probabilities", "loss")
RECORD, FIGURE = "transfer.json", "transfer.svg"

Models = Annotated[
    list[str] | None,
    typer.Option("--model", metavar="MODEL", help=f"{FORM}; give two or more.", show_default=False),
]
Attacks = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        metavar="NAME",
        help="May be repeated; the others are compared with the first. Default: pgd, mifgsm, difgsm.",
        show_default=False,
    ),
]
Sources = Annotated[
    list[str] | None,
    typer.Option(
        "--source", metavar="NAME", help="Only these models make points. Default: all.", show_default=False
    ),
]
Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Of every attack.")]
Fused = Annotated[
    str | None,
    typer.Option(
        "--ensemble",
        metavar="HOW",
        help="For every target all others fused as a source too: logits, probabilities or loss.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help=f"A new folder for {RECORD} and {FIGURE}.", show_default=False),
]


def transfer(
    models: Models = None,
    attacks: Attacks = None,
    data: options.DataName = None,
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    steps: Steps = 10,
    sources: Sources = None,
    fused: Fused = None,
    n: options.Count = 1000,
    seed: options.Seed = 0,
    out: Out = None,
    bounds: options.Bounds = "0,1",
    device: options.Device = None,
    data_root: options.DataRoot = None,
    as_json: options.Json = False,
) -> None:
    """Measure how adversarial points carry over from each model to each other."""
    named = _models(models or [])
    names = _attacks(attacks or ["pgd", "mifgsm", "difgsm"], norm)
    _check(named, sources or [], fused, steps)
    subject = options.make_subject(
        named[0].spec, data, norm, eps, n=n, seed=seed, bounds=bounds, device=device, data_root=data_root
    )
    if len(subject.eps) > 1:
        raise ConfigError("--eps: a transfer matrix takes one radius")
    if out is not None and out.exists():
        raise RunError(f"--out: {out} exists already; choose another folder")
    options.check_writable(out)
    with warnings.catch_warnings(), Meter("loading", quiet=as_json) as meter:
        options.hush()
        samples = subject.load_data(subject.bounds)
        classes = len(samples.classes) or None
        loaded: dict[str, Classifier] = {
            model.name: model.load(bounds=subject.bounds, device=device, classes=classes) for model in named
        }
        x, y = samples.batch(range(len(samples)))
        table = room("attacks.transfer").load("matrix")(
            loaded, x, y, subject.threats()[0], names, steps=steps, fused=cast("Any", fused),
            sources=sources or None, seed=seed, progress=meter,
        )  # fmt: skip
    record = {**table.to_dict(), "data": subject.data, "out": None if out is None else str(out)}
    if out is not None:
        _save(out, table, record)
    if as_json:
        print(json.dumps(record, ensure_ascii=False))
    else:
        _show(table, subject)
        if out is not None:
            print(f"saved to  {out}")


def _models(texts: Sequence[str]) -> list[NamedModel]:
    if len(texts) < 2:
        raise ConfigError(f"--model: {len(texts)} given; a transfer matrix needs two or more, each {FORM}")
    found = [parse_model(text) for text in texts]
    names = [model.name for model in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--model: two are called {name}; name them, as a={texts[names.index(name)]}")
    return found


def _attacks(names: Sequence[str], norm: str) -> list[str]:
    """The attacks, each a white-box one of a fixed budget that has the norm."""
    for name in names:
        kind = room("attacks").load(name)
        if kind.knowledge != "white" or kind.minimum_norm or kind.semantic:
            raise ConfigError(
                f"--attack: {name} cannot be transferred; use a white-box attack of a fixed budget"
            )
        if norm in options.NORMS and norm not in kind.norms:
            raise ThreatError(f"--norm: {name} has no {norm} form; it knows {', '.join(kind.norms)}")
        if names.count(name) > 1:
            raise ConfigError(f"--attack: {name} is given twice")
    return list(names)


def _check(named: Sequence[NamedModel], sources: Sequence[str], fused: str | None, steps: int) -> None:
    names = [model.name for model in named]
    for name in sources:
        if name not in names:
            raise ConfigError("--source: " + unknown("model", name, names))
    if fused is not None and fused not in FUSED:
        raise ConfigError("--ensemble: " + unknown("ensemble", fused, list(FUSED)))
    if fused is not None and len(named) < 3:
        raise ConfigError(f"--ensemble: {len(named)} models leave nothing to fuse for each; give at least 3")
    if steps < 1:
        raise ConfigError(f"--steps: {steps} is no search; give at least 1")


def _save(out: Path, table: Any, record: dict[str, Any]) -> None:
    from robust.digest import write_atomic, write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / RECORD, record)
    write_atomic(out / FIGURE, room("attacks.transfer").load("figure")(table))


def _show(table: Any, subject: options.Subject) -> None:
    from rich import box
    from rich.table import Table

    grid = Table(
        title=f"transfer on {subject.data}: {subject.norm} {options.radius(subject.eps[0])}, {table.n} samples",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    first = next(iter(table.attacks))
    heads = ("attack", "source", "target", "fooled", "95 % interval", f"against {first}", "p")
    for head in heads:
        grid.add_column(head, no_wrap=head in heads[:3])
    for cell in table.cells:
        if not cell.n:
            grid.add_row(cell.attack, cell.source, cell.target, "none to count", "", "", "")
            continue
        low, high = (options.percent(value) for value in cell.interval)
        gain = "" if cell.attack == first else f"{100 * cell.gain:+.1f} ± {100 * cell.gain_error:.1f}"
        p = "" if cell.attack == first else f"{cell.p:.1g}"
        rate = f"{options.percent(cell.rate)} of {cell.n}"
        grid.add_row(cell.attack, cell.source, cell.target, rate, f"{low} to {high}", gain, p)
    options.print_table(grid)
    accuracy = "   ".join(f"{m['name']} {options.percent(m['accuracy'])}" for m in table.models)
    print(f"clean accuracy: {accuracy}")
    print("counted are samples that source and target both classify correctly")
