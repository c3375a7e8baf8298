"""`robust matrix [MODEL ...]`: models and defences against suites and a patch, proof in every cell."""

from __future__ import annotations

import json
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import eval as single
from robust.cli import options
from robust.cli.interrupt import resumable
from robust.cli.progress import Meter, duration
from robust.cli.settings import make_defenses
from robust.cli.universal import TRAIN
from robust.errors import ConfigError, RunError
from robust.models.named import FORM, NamedModel, parse_model
from robust.registry import room

if TYPE_CHECKING:
    from robust.classifier import Classifier
    from robust.data import Data
    from robust.defense import Defense
    from robust.matrix import Row, Setup

DEFAULT_MODELS = ("zoo:digits", "zoo:digits-at")
DEFAULT_SUITES = ("quick", "standard", "patch", "transfer")
PATCH, ALL = "patch", "all"
SHARE = "0.1"

Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL]...",
        help=f"{FORM}; none: the shipped digits models.",
        show_default=False,
    ),
]
Defenses = Annotated[
    list[str] | None,
    typer.Option(
        "--defense",
        metavar="NAME[:KEY=VALUE,...][+NAME...]",
        help="Also the first model behind this defense; + composes, in the order in which inputs meet them; may be "
        "repeated: a row each. all: a row for every transform of `robust list defenses`.",
        show_default=False,
    ),
]
Suites = Annotated[
    list[str] | None,
    typer.Option(
        "--suite",
        metavar="SUITE",
        help="A column: a suite or attacks as `robust eval` takes them, or patch: a universal patch learnt on each row "
        f"itself. May be repeated. Default: {', '.join(DEFAULT_SUITES)}.",
        show_default=False,
    ),
]
Train = Annotated[
    int,
    typer.Option(
        "--train", metavar="N", help="patch: samples it is learnt on, none of the --n measured; at most half."
    ),
]
Size = Annotated[str, typer.Option("--size", metavar="SHARE", help="patch: its share of the image's area.")]
Steps = Annotated[
    int | None,
    typer.Option(
        "--patch-steps",
        metavar="N",
        help="patch: steps of learning. Default: the attack's own.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="The matrix's folder. Default: a new one below runs/.",
        show_default=False,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on with the matrix in --out; finished cells are kept, rows may be added."
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify", help="Check the evidence of every cell in --out, and write nothing.")
]


@dataclass(frozen=True)
class Job:
    """A checked command: nothing is loaded yet.

    Attributes:
        models: one row each; defenses: further rows of the first, as text and as what it means.
        columns: suites and `patch`. train, share, steps: of patches.
    """

    subject: options.Subject
    models: tuple[NamedModel, ...]
    texts: tuple[str, ...]
    defenses: tuple[tuple[str, tuple[Defense, ...]], ...]
    columns: tuple[str, ...]
    surrogates: tuple[NamedModel, ...]
    train: int
    share: float
    steps: int | None
    precision: str


def matrix(
    models: Models = None,
    defense: Defenses = None,
    suite: Suites = None,
    surrogates: single.Surrogates = None,
    data: options.DataName = None,
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    n: options.Count = 1000,
    train: Train = TRAIN,
    size: Size = SHARE,
    patch_steps: Steps = None,
    seed: options.Seed = 0,
    out: Out = None,
    resume: Resume = False,
    verify: Verify = False,
    bounds: options.Bounds = "0,1",
    precision: options.Precision = "auto",
    device: options.Device = None,
    data_root: options.DataRoot = None,
    as_json: options.Json = False,
) -> None:
    """Measure models and defenses against suites and a patch: one table, one picture, evidence in every cell."""
    texts = tuple(models or DEFAULT_MODELS)
    options.check_precision(precision)
    named = tuple(parse_model(text) for text in texts)
    subject = options.make_subject(
        named[0].spec, data, norm, eps, n=n, seed=seed, bounds=bounds, device=device, data_root=data_root
    )
    columns = tuple(suite or DEFAULT_SUITES)
    job = Job(
        subject, named, texts, _defenses(defense or []), columns,
        tuple(parse_model(text) for text in surrogates or []), train, options.number(size, "--size"), patch_steps,
        precision,
    )  # fmt: skip
    _check(job)
    folder = out or _folder(job, resume or verify)
    _check_out(folder, resume, verify)
    with resumable(folder):
        found = _run(job, folder, resume=resume, verify=verify, quiet=as_json)
    if as_json:
        print(json.dumps({**found, "out": str(folder)}, ensure_ascii=False))
    elif verify:
        print(
            f"verified: {found['cells']} cells, {found['examples']} adversarial examples, every file as it was"
        )
    else:
        _show(found, folder)


def _defenses(texts: Sequence[str]) -> tuple[tuple[str, tuple[Defense, ...]], ...]:
    """`jpeg:quality=90+bit-depth:bits=4` as a name of a row and what inputs meet; `all` is a row for each transform."""
    transforms = [name for name in room("defenses") if room("defenses").load(name).kind == "transform"]
    every = [name for text in texts for name in (transforms if text.strip() == ALL else [text])]
    found = []
    for text in every:
        parts = [part.strip() for part in re.split(r"\+(?=\s*[a-z])", text)]
        found.append((" + ".join(parts), make_defenses(parts)))
    return tuple(found)


def _check(job: Job) -> None:
    """What can be refused before anything is loaded."""
    from robust.matrix import uses_surrogates
    from robust.suites import stages

    subject = job.subject
    names = row_names(job)
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"two rows are called {name}; name models, as other=MODEL, and give a defense once"
            )
    for column in job.columns:
        if job.columns.count(column) > 1:
            raise ConfigError(f"--suite: {column} is given twice")
        if column != PATCH:
            stages(column, subject.norm)
    if len(subject.eps) > 1:
        raise ConfigError("--eps: a matrix takes one radius")
    used = any(column != PATCH and uses_surrogates(column, subject.norm) for column in job.columns)
    if job.surrogates and not used:
        raise ConfigError("--surrogate: no column uses any; they are for suite transfer or full")
    if job.train < 1:
        raise ConfigError(f"--train: {job.train} samples teach nothing; give at least 1")
    if not 0 < job.share <= 1:
        raise ConfigError(
            f"--size: {job.share:g} is no share of the area; give one in (0, 1], such as {SHARE}"
        )
    if job.steps is not None and job.steps < 1:
        raise ConfigError(f"--patch-steps: {job.steps} teach nothing; give at least 1")


def row_names(job: Job) -> list[str]:
    """What the table calls its rows: the first model, it behind every defence, the other models."""
    first, *others = (model.name for model in job.models)
    return [first, *(f"{first} + {text}" for text, _ in job.defenses), *others]


def _folder(job: Job, resume: bool) -> Path:
    subject = job.subject
    parts = (
        single.last(job.models[0].spec),
        single.last(subject.data),
        subject.norm,
        single.slug(subject.eps_text),
    )
    return single.new_folder(f"matrix-{'-'.join(parts)}-seed{subject.seed}", resume)


def _check_out(folder: Path, resume: bool, verify: bool) -> None:
    from robust.matrix import CELLS, check_folder

    options.check_writable(folder)
    if verify and resume:
        raise ConfigError("--verify writes nothing, --resume goes on; give one of them")
    if verify and not (folder / CELLS).is_dir():
        raise RunError(f"{folder} is no matrix's folder; name the one that `robust matrix` wrote with --out")
    if not verify:
        check_folder(folder, resume)


def _run(job: Job, folder: Path, *, resume: bool, verify: bool, quiet: bool) -> dict[str, Any]:
    """The record of the matrix, or what was verified."""
    from robust import matrix as core
    from robust.report_matrix import write_matrix

    with warnings.catch_warnings(), Meter("loading", quiet=quiet) as meter:
        options.hush()
        setup, rows = _load(job)
        if verify:
            return dict(core.verify(rows, setup, folder))
        record = core.measure(rows, setup, folder, resume=resume, progress=meter)
        record["command"] = _command()
        write_matrix(record, folder)
        return record


def _load(job: Job) -> tuple[Setup, list[Row]]:
    """The samples, apart from those that patches are learnt on, and the rows."""
    from robust.defense import compose
    from robust.matrix import Row, Setup
    from robust.matrix_patch import PatchSettings

    subject = job.subject
    data, learn = _split(job)
    loaded = [_classifier(model, job, len(data.classes) or None) for model in job.models]
    given = [
        _arguments(job, text, model, len(data)) for text, model in zip(job.texts, job.models, strict=True)
    ]
    names = row_names(job)
    rows = [Row(names[0], loaded[0], given[0])]
    for name, (_, parts) in zip(names[1:], job.defenses, strict=False):
        text = name.removeprefix(f"{names[0]} + ").split(" + ")
        more = tuple(word for part in text for word in ("--defense", part))
        rows.append(Row(name, compose(loaded[0], parts), (*given[0], *more)))
    rows += [
        Row(model.name, clf, words)
        for model, clf, words in zip(job.models[1:], loaded[1:], given[1:], strict=True)
    ]
    setup = Setup(
        data, subject.threats()[0], learn, job.columns,
        tuple(_classifier(model, job, len(data.classes) or None) for model in job.surrogates),
        subject.seed, job.precision, PatchSettings(job.share, job.steps),
    )  # fmt: skip
    return setup, rows


def _classifier(named: NamedModel, job: Job, classes: int | None) -> Classifier:
    """A model in the matrix's box, which all of them share."""
    clf = named.load(bounds=job.subject.bounds, device=job.subject.device, classes=classes)
    if clf.bounds != job.subject.bounds:
        raise ConfigError(
            f"{named.name} has the box {clf.bounds}; --bounds says {job.subject.bounds}, for all of them"
        )
    return clf


def _split(job: Job) -> tuple[Data, Data | None]:
    """The first samples, which are measured, and those after them, which patches are learnt on; at most half."""
    from robust.matrix_patch import unseen_rows

    subject = job.subject
    if PATCH not in job.columns:
        return subject.load_data(subject.bounds), None
    data = replace(subject, n=subject.n + job.train).load_data(subject.bounds)
    train = min(job.train, len(data) // 2)
    measured = min(subject.n, len(data) - train)
    if train < 1:
        raise ConfigError(
            f"--data: {data.name} has {len(data)} sample; a patch is learnt on others than it is measured on"
        )
    rows = unseen_rows(data, measured)[: job.train]
    return data.subset(range(measured)), data.subset(rows)


def _arguments(job: Job, text: str, model: NamedModel, n: int) -> tuple[str, ...]:
    """The words of the `robust eval` that makes a row's verdicts."""
    subject = job.subject
    words = [
        model.spec,
        "--data",
        subject.data,
        "--norm",
        subject.norm,
        "--eps",
        subject.eps_text,
        "--n",
        str(n),
    ]
    for option, value in (
        ("--weights", model.weights),
        ("--device", subject.device),
        ("--data-root", subject.data_root),
    ):
        words += [] if value is None else [option, str(value)]
    for option, values in (("--mean", model.mean), ("--std", model.std)):
        words += [] if values is None else [option, ",".join(map(repr, values))]
    if subject.bounds != (0.0, 1.0):
        words += ["--bounds", ",".join(map(repr, subject.bounds))]
    return (*words, *([] if job.precision == "auto" else ["--precision", job.precision]))


def _command() -> str | None:
    """The command line, if it was one of ours, without what only resumes it."""
    program, *arguments = sys.argv
    ours = Path(program).name in ("robust", "__main__.py")
    return shlex.join(["robust", *(word for word in arguments if word != "--resume")]) if ours else None


def _shown(entry: Any) -> str:
    """A number of the table; below it what its column's own attacks leave, where that is more."""
    if entry.accuracy is None:
        return ""
    alone = "" if entry.alone is None else f"\n[{100 * entry.alone:.1f}]"
    return f"{100 * entry.accuracy:.1f}{alone}"


def _show(record: dict[str, Any], folder: Path) -> None:
    from rich import box
    from rich.table import Table

    from robust.report_matrix import FIGURE, PAGE, entries, heads, title

    print(f"accuracy left in percent, {title(record)}")
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    grid.add_column("model", overflow="fold")
    for head in heads(record):
        grid.add_column(head, justify="right", no_wrap=True)
    for row in record["rows"]:
        found = entries(record, row)
        cells = [_shown(entry) for entry in found.values()]
        if row["overstated"]:
            cells[-1] += f"\n({100 * row['overstated']['by']:+.1f})"
        grid.add_row(row["name"].replace(" + ", "\n + "), *cells)
    options.print_table(grid)
    doubts = {line for row in record["rows"] for cell in row["cells"].values() for line in cell["warnings"]}
    print("worst counts the samples that stood under every column")
    if any(entry.alone is not None for row in record["rows"] for entry in entries(record, row).values()):
        print(
            "[in brackets]: what the column's own attacks leave, where some that do not know of the defense broke more"
        )
    if any(row["overstated"] for row in record["rows"]):
        print("claimed: by PGD that does not know of the defense, and by how many points that overstates")
    print(f"doubts    {len(doubts)}, named in the page\ntook      {duration(record['seconds'])}")
    print(f"page      {folder / PAGE}\npicture   {folder / FIGURE}")
