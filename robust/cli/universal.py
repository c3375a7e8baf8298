"""`robust attack uap|targeted-uap|patch`: one change learnt on some images and measured on others and other models."""

from __future__ import annotations

import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options
from robust.cli.progress import Meter, duration
from robust.errors import ConfigError, RobustError, ThreatError
from robust.models.named import FORM, NamedModel, parse_model

if TYPE_CHECKING:
    from robust.classifier import Classifier
    from robust.data import Data

TRAIN = 500
WIDTH_MM = 100.0
DPI = 300.0
SIZE = "0.1"

Train = Annotated[
    int | None,
    typer.Option(
        "--train",
        metavar="N",
        help=f"uap, patch: images it is learnt on, before the --n unseen ones. Default: {TRAIN}, at most half.",
        show_default=False,
    ),
]
Size = Annotated[
    str | None,
    typer.Option(
        "--size",
        metavar="SIZE",
        help=f"patch: its share of the image's area, or its sides in pixels such as 10x10. Default: {SIZE}.",
        show_default=False,
    ),
]
WidthMm = Annotated[
    float | None,
    typer.Option(
        "--width-mm",
        metavar="MM",
        help=f"patch: its width on paper, at {DPI:g} dpi. Default: {WIDTH_MM:g}.",
        show_default=False,
    ),
]
Also = Annotated[
    list[str] | None,
    typer.Option(
        "--also",
        metavar="MODEL",
        help=f"uap, patch: measure it on this model too, {FORM}; may be repeated. Weights without a normalisation of "
        "their own take --mean and --std.",
        show_default=False,
    ),
]
Photo = Annotated[
    list[Path] | None,
    typer.Option(
        "--photo",
        metavar="FILE",
        help="patch: place it in this photograph; may be repeated.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Extras:
    """The options that only universal attacks and patches have; None or empty where they were not given."""

    train: int | None = None
    size: str | None = None
    width_mm: float | None = None
    also: tuple[str, ...] = ()
    photos: tuple[Path, ...] = ()

    @property
    def others(self) -> list[NamedModel]:
        """The models of `--also`."""
        try:
            return [parse_model(text) for text in self.also]
        except RobustError as error:
            raise ConfigError(f"--also: {error}") from None

    def refuse(
        self, name: str, only: Sequence[str] = ("train", "size", "width_mm", "also", "photos")
    ) -> None:
        """One line if any of these options was given to an attack that has no use for it."""
        for field in only:
            if getattr(self, field) not in (None, ()):
                option = "--" + {"width_mm": "width-mm", "photos": "photo"}.get(field, field)
                raise ConfigError(
                    f"{option}: {name} has no use for it; it is for patches and universal attacks"
                )


@dataclass(frozen=True)
class Job:
    """A checked command: what to learn, on what, and where the results go."""

    name: str
    kind: Any
    subject: options.Subject
    extras: Extras
    others: list[NamedModel]
    fields: dict[str, Any]
    target: str | None
    precision: str
    out: Path | None

    @property
    def is_patch(self) -> bool:
        """Whether it is a patch, which has a size instead of a radius."""
        return bool(self.kind.norms == ("patch",))


def run(
    name: str,
    kind: Any,
    extras: Extras,
    settings: Sequence[str],
    *,
    target: str | None,
    out: Path | None,
    precision: str,
    as_json: bool,
    norm: str,
    eps: str | None,
    n: int,
    **given: Any,
) -> None:
    """Learn, measure, write and show; everything is checked before anything is loaded or written."""
    from robust.cli.attack import hyper_parameters
    from robust.universal_run import learn_and_measure

    job = _check(name, kind, extras, norm, eps, n, given, settings=hyper_parameters(kind, settings),
                 target=target, out=out, precision=precision)  # fmt: skip
    with warnings.catch_warnings(), Meter(name, quiet=as_json) as meter:
        options.hush()
        model, learn, unseen = _load(job, n)
        attack = _build(job, learn)
        others = _others(job, learn)
        found = learn_and_measure(
            attack,
            model,
            learn,
            unseen,
            name=name,
            target=_class(job, model, learn),
            others=others,
            seed=job.subject.seed,
            precision=precision,
            progress=meter,
        )
        found.summary |= {
            "model": job.subject.model,
            "data": job.subject.data,
            "out": None,
            "command": _command(),
        }
        found.show_photos(extras.photos)
        if out is not None:
            found.write(out, width_mm=extras.width_mm or WIDTH_MM, dpi=DPI)
    if as_json:
        print(json.dumps(found.summary, ensure_ascii=False))
    else:
        _show(found.summary)


def _check(
    name: str,
    kind: Any,
    extras: Extras,
    norm: str,
    eps: str | None,
    n: int,
    given: dict[str, Any],
    *,
    settings: dict[str, Any],
    target: str | None,
    out: Path | None,
    precision: str,
) -> Job:
    """The command, its options held against each other."""
    patch = kind.norms == ("patch",)
    if not patch:
        extras.refuse(name, ("size", "width_mm", "photos"))
    elif eps is not None:
        raise ConfigError("--eps: a patch has no radius; give its size, such as --size 0.1 or --size 10x10")
    train = TRAIN if extras.train is None else extras.train
    if train < 1:
        raise ConfigError(f"--train: {train} images teach nothing; give at least 1")
    if extras.width_mm is not None and not extras.width_mm > 0:
        raise ConfigError(f"--width-mm: {extras.width_mm:g} is no width; give millimetres above 0")
    if n < 1:
        raise ConfigError(f"--n: {n} samples cannot be evaluated; give at least 1")
    others = extras.others
    for photo in extras.photos:
        _check_photo(photo)
    if out is not None and out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; {name} writes a folder")
    options.check_writable(None if out is None else out / "report.html")
    # The patch's own geometry is no norm of the subject, whose radius is then left alone.
    subject = options.make_subject(norm="linf" if patch and norm in ("linf", "patch") else norm, eps=eps,
                                   n=n + train, **given)  # fmt: skip
    if len(subject.eps) > 1:
        raise ConfigError("--eps: an attack takes one radius; `robust eval` takes a list")
    if (not patch and subject.norm not in kind.norms) or (patch and subject.norm != "linf"):
        raise ThreatError(f"--norm: {name} has no {subject.norm} form; it knows {', '.join(kind.norms)}")
    return Job(name, kind, subject, extras, others, settings, target, precision, out)


def _check_photo(path: Path) -> None:
    """Refuse what is no picture before an hour of learning."""
    from robust.data.files import EncodedImages

    if not path.is_file():
        raise ConfigError(f"--photo: {path} does not exist")
    try:
        EncodedImages([str(path)]).read([0])
    except RobustError as error:
        raise ConfigError(f"--photo: {error}") from None


def _load(job: Job, n: int) -> tuple[Classifier, Data, Data]:
    """The model, the images to learn from, and the unseen ones after them; half each where there are too few."""
    model, data = job.subject.load_classifier()
    if len(data) < 2:
        raise ConfigError(
            f"--data: {data.name} has {len(data)} image; one to learn from and one unseen are needed"
        )
    train = job.extras.train or TRAIN
    if len(data) - train < min(n, len(data) // 2):
        train = len(data) // 2
    return model, data.subset(range(train)), data.subset(range(train, min(train + n, len(data))))


def _build(job: Job, data: Data) -> Any:
    """The attack; a patch of the size that was asked for."""
    if not job.is_patch:
        return job.kind(threat=job.subject.threats()[0], **job.fields)
    _, height, width = data.shape
    text = job.extras.size or SIZE
    sides = text.lower().replace("×", "x").split("x")
    if len(sides) == 2 and all(side.strip().isdigit() for side in sides):
        from robust.threat import Patch

        return job.kind(threat=Patch(height=int(sides[0]), width=int(sides[1])), **job.fields)
    try:
        return job.kind.sized(options.number(text, "--size"), height, width, **job.fields)
    except RobustError as error:
        raise ConfigError(f"--size: {str(error).removeprefix('--size: ')}") from None


def _class(job: Job, model: Classifier, data: Data) -> int | None:
    """The class that `--target` means, by its number or name."""
    if job.target is None:
        return None
    if job.target in data.classes:
        return data.classes.index(job.target)
    model.logits(data.batch([0])[0])  # a model tells its number of classes with its first answer
    if not job.target.isdigit() or int(job.target) >= model.classes:
        raise ConfigError(
            f"--target: {job.target} is no class; one change leads to one class: its name, or 0 to {model.classes - 1}"
        )
    return int(job.target)


def _others(job: Job, data: Data) -> dict[str, Classifier]:
    """The models of `--also`, in the box of the first."""
    found: dict[str, Classifier] = {}
    subject = job.subject
    for named in job.others:
        if named.weights is not None and named.mean is None and named.std is None:
            named = replace(named, mean=subject.mean, std=subject.std)  # noqa: PLW2901
        other = named.load(bounds=subject.bounds, device=subject.device, classes=len(data.classes) or None)
        other.logits(data.batch([0])[0])
        name = named.name
        found[name if name not in found else f"{name} ({len(found) + 1})"] = other
    return found


def _show(summary: dict[str, Any]) -> None:
    rows = [
        ("fools", _rate(summary)),
        ("clean accuracy", options.percent(summary["clean_accuracy"])),
        ("accuracy under it", options.percent(summary["robust_accuracy"])),
        ("noise of its size", _rate(summary["control"])),
    ]
    if "printed" in summary:
        rows.append(("in print and light", _rate(summary["printed"])))
    if "grid" in summary:
        rows.append(("scale and angle", _corners(summary["grid"])))
    rows += [(f"on {row['model']}", _rate(row)) for row in summary["transfer"]]
    rows += [
        (row["photo"], f"{row['clean']} becomes {row['with_patch']}") for row in summary.get("photos", ())
    ]
    cost = summary["cost"]
    counts = (f"{int(cost[key]):,} {key}" for key in ("forwards", "backwards") if cost[key])
    rows.append(("cost", "  ".join([*counts, duration(cost["seconds"])])))
    rows.append(("settings", " ".join(f"{key}={value}" for key, value in summary["parameters"].items())))
    rows += [("doubt", line) for line in summary["warnings"]]
    goal = "" if summary["target"] is None else f" to {summary['target_name']}"
    options.show(
        f"{summary['attack']}{goal} on {summary['model']}, {summary['data']}: learnt on {summary['train']} images, "
        f"{summary['n']} unseen, {_limit(summary)}",
        rows,
    )
    if summary["out"]:
        print(f"report    {Path(summary['out']) / 'report.html'}")


def _command() -> str | None:
    """The command line, if it was one of ours."""
    program, *arguments = sys.argv
    return shlex.join(["robust", *arguments]) if Path(program).name in ("robust", "__main__.py") else None


def _rate(row: dict[str, Any]) -> str:
    if row["success_rate"] is None:
        return "nothing to fool"
    low, high = (options.percent(value) for value in row["interval"])
    rate = options.percent(row["success_rate"])
    return f"{rate}   {row['fooled']} of {row['attempted']}, 95 % interval {low} to {high}"


def _corners(grid: dict[str, Any]) -> str:
    values = [value for row in grid["rates"] for value in row]
    return (
        f"{options.percent(min(values))} to {options.percent(max(values))}, scale {grid['scales'][0]:g} to "
        f"{grid['scales'][-1]:g}, angle ± {grid['angles'][-1]:g}°"
    )


def _limit(summary: dict[str, Any]) -> str:
    threat = summary["threat"]
    if "area" in summary:
        height, width = summary["shape"]
        return f"patch {height:.4g} × {width:.4g}, {options.percent(summary['area'])} of the area"
    return f"{threat['norm']} {options.radius(threat['eps'])}"
