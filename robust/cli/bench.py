"""`robust bench NAME`: ours and the peers on the same work, in alternation, with a record that others can repeat."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options
from robust.errors import ConfigError
from robust.registry import room

if TYPE_CHECKING:
    from torch import Tensor

    from robust.classifier import Classifier

Name = Annotated[str, typer.Argument(metavar="NAME", help="A benchmark; see `robust list benchmarks`.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="zoo:NAME, torchvision:NAME, FILE.py:FACTORY or exported:FILE.pt2; none takes the digits model.",
        show_default=False,
    ),
]
Count = Annotated[
    int | None,
    typer.Option(
        "--n", metavar="N", help="How many samples. Default: the benchmark's own.", show_default=False
    ),
]
Repeats = Annotated[
    int | None,
    typer.Option(
        "--repeats",
        metavar="R",
        help="Rounds of the alternation. Default: the benchmark's own.",
        show_default=False,
    ),
]
Threads = Annotated[int, typer.Option("--threads", metavar="T", help="Of every contestant.")]
Only = Annotated[
    str | None,
    typer.Option("--only", metavar="PEER,...", help="Measure against these peers only.", show_default=False),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="PRECISION,...",
        help="Measure ours in these: auto, float32, bfloat16, original. Default: the benchmark's own.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        help="Where the record goes. Default: NAME-DEVICE.json among the project's results.",
        show_default=False,
    ),
]


def bench(
    name: Name,
    model: Model = None,
    data: options.DataName = None,
    eps: options.Eps = None,
    n: Count = None,
    repeats: Repeats = None,
    threads: Threads = 1,
    seed: options.Seed = 0,
    only: Only = None,
    precision: Precision = None,
    out: Out = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0,1",
    device: options.Device = None,
    data_root: options.DataRoot = None,
    as_json: options.Json = False,
) -> None:
    """Measure ours against other libraries, correctness first, and record every repeat."""
    benchmark: Any = room("experiments.benchmarks").load(name)()
    count = n if n is not None else max(benchmark.samples, 1)
    subject = options.make_subject(
        model, data, "linf", eps or benchmark.eps, n=count, seed=seed, weights=weights, mean=mean, std=std,
        bounds=bounds, device=device, data_root=data_root,
    )  # fmt: skip
    if len(subject.eps) > 1:
        raise ConfigError("--eps: a benchmark takes one radius")
    wishes: dict[str, Any] = {"eps": subject.eps[0], "seed": seed, "threads": threads}
    wishes |= {"repeats": benchmark.rounds if repeats is None else repeats}
    wishes |= {"only": _words(only), "modes": _words(precision), "device": _place(device)}
    work = benchmark.prepare(lambda: _load(subject), **wishes)
    place = out or benchmark.place(work.device)
    options.check_writable(place)
    with warnings.catch_warnings():
        options.hush()
        record = benchmark.record(work, _settings(subject) if benchmark.samples else {})
    _save(place, record)
    if as_json:
        print(json.dumps({**record, "out": str(place)}, ensure_ascii=False))
    else:
        _show(benchmark, record, place)


def _words(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip()) if text else ()


def _place(device: str | None) -> Any:
    import torch

    from robust.models import find_device

    return find_device(device) or torch.device("cpu")


def _load(subject: options.Subject) -> tuple[Classifier, Tensor, Tensor]:
    """The classifier and all its samples."""
    classifier, data = subject.load_classifier()
    return (classifier, *data.batch(range(len(data))))


def _settings(subject: options.Subject) -> dict[str, Any]:
    """What the subject was called, without the paths of this machine."""
    kind, _, path = subject.data.partition(":")
    data = f"{kind}:{Path(path).name}" if path else kind
    return {
        "model": Path(subject.model).name,
        "data": data,
        "n": subject.n,
        "weights": subject.weights and subject.weights.name,
    }


def _save(place: Path, record: Mapping[str, Any]) -> None:
    from robust.digest import write_json

    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, record)


def _show(benchmark: Any, record: Mapping[str, Any], place: Path) -> None:
    from rich import box
    from rich.table import Table

    heads, rows = benchmark.table(record)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, overflow="fold")
    for row in rows:
        table.add_row(*row)
    options.print_table(table)
    for line in record["skipped"].values():
        print(line)
    print(f"record    {place}")
