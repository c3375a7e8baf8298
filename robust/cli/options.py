"""What commands share: option types, numbers with fractions, and a subject checked before anything is loaded."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from robust.cli.settings import BlackBox, black_box, make_defenses
from robust.config import number as parse_number
from robust.errors import ConfigError, RunError, ThreatError
from robust.registry import unknown

if TYPE_CHECKING:
    from rich.table import Table

    from robust.classifier import Classifier
    from robust.data import Data
    from robust.defense import Defense
    from robust.oracle import Answers, Oracle
    from robust.threat import Threat

NORMS = ("linf", "l2", "l1", "l0")
PRECISIONS = ("auto", "float32", "bfloat16", "original")
DEFAULT_MODEL = "zoo:digits"
# The radius the papers report for the data, in the unit of [0, 1] inputs; "" stands for every other data.
_EPS = {
    ("linf", "digits"): "0.2",
    ("linf", "mnist"): "0.3",
    ("linf", "fashion-mnist"): "0.1",
    ("linf", "imagefolder"): "4/255",
    ("linf", ""): "8/255",
    ("l2", "mnist"): "2",
    ("l2", "imagefolder"): "3",
    ("l2", ""): "0.5",
    ("l1", ""): "12",
    ("l0", ""): "10",
}

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="zoo:NAME, torchvision:NAME, FILE.py:FACTORY, exported:FILE.pt2, onnx:FILE or the address of an endpoint "
        "(http://HOST:PORT); none runs the embedded digits model.",
        show_default=False,
    ),
]
DataName = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="digits, mnist, fashion-mnist, cifar10, cifar100, imagefolder:DIR, npz:FILE or csv:FILE.",
        show_default=False,
    ),
]
Norm = Annotated[str, typer.Option("--norm", metavar="NORM", help="linf, l2, l1 or l0.")]
Eps = Annotated[
    str | None,
    typer.Option(
        "--eps",
        metavar="EPS",
        help="Radius in the unit of the inputs, such as 8/255; a comma list gives a robustness curve. "
        "Default: the usual radius for the data.",
        show_default=False,
    ),
]
Count = Annotated[int, typer.Option("--n", metavar="N", help="How many samples, at most.")]
Seed = Annotated[int, typer.Option("--seed", metavar="SEED", help="Keys every random draw.")]
Weights = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="safetensors, or a state dict.", show_default=False),
]
Mean = Annotated[
    str | None,
    typer.Option("--mean", metavar="A,B,C", help="The model's input mean, per channel.", show_default=False),
]
Std = Annotated[
    str | None,
    typer.Option(
        "--std", metavar="A,B,C", help="The model's input deviation, per channel.", show_default=False
    ),
]
Bounds = Annotated[
    str,
    typer.Option(
        "--bounds",
        metavar="LOW,HIGH",
        help="The box of the inputs, before mean and std; data are scaled to it.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="cpu, cuda or cuda:0; default: the best there is.",
        show_default=False,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", metavar="DIR", help="Where named data lies.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="PRECISION",
        help="What the attacks compute in: float32; bfloat16, which scouts before it; original: no faster twin of the "
        "model; auto: what the run repays. The original model in float32 decides in any case.",
    ),
]


@dataclass(frozen=True)
class Subject:
    """A model, its data and a threat as the command line named them: checked, but nothing loaded yet."""

    model: str
    data: str
    norm: str
    eps: tuple[float, ...]
    eps_text: str
    bounds: tuple[float, float]
    n: int
    seed: int
    weights: Path | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    device: str | None
    data_root: Path | None
    black_box: BlackBox = field(default_factory=BlackBox)
    defenses: tuple[Defense, ...] = ()

    @property
    def deployed(self) -> bool:
        """Whether only the model's answers are seen: `load` gives an Oracle."""
        from robust.models import is_deployed

        return self.black_box.wanted or is_deployed(self.model)

    def threats(self) -> list[Threat]:
        """One threat per radius, smallest first."""
        from robust.threat import make_threat

        return [make_threat(self.norm, eps) for eps in self.eps]

    def load_data(self, bounds: tuple[float, float]) -> Data:
        """The first n samples of the data, scaled from [0, 1] to the box `bounds` when they are read."""
        from robust.data import load_data
        from robust.data.boxed import BoxedImages

        data = load_data(self.data, n=self.n, root=self.data_root)
        return data if bounds == (0.0, 1.0) else replace(data, images=BoxedImages(data.images, *bounds))

    def load(self) -> tuple[Classifier | Oracle, Data]:
        """The model in its box and normalisation, and the data in the same box."""
        from robust.classifier import Classifier
        from robust.models import load_model
        from robust.oracle import Oracle

        data, asked = self.load_data((0.0, 1.0)), self.black_box
        model = load_model(
            self.model,
            weights=self.weights,
            mean=self.mean,
            std=self.std,
            bounds=self.bounds,
            device=self.device,
            classes=asked.classes or len(data.classes) or None,
            answers=cast("Answers | None", asked.answers),
            budget=asked.budget,
            endpoint=asked.endpoint,
        )
        if isinstance(model, Oracle) and model.answers != (asked.answers or "scores"):
            raise ConfigError(f"{self.model} gives {model.answers} only; add --answers {model.answers}")
        inner = model.backend if isinstance(model, Oracle) else model
        if isinstance(inner, Classifier):
            inner.module.eval()  # what a factory has just built is in train mode, which nobody meant
        if self.defenses and isinstance(model, Classifier):
            from robust.defense import compose

            model = compose(model, self.defenses)
        # A factory may return a Classifier with a box of its own, and an endpoint may tell its own.
        return model, data if model.bounds == (0.0, 1.0) else self.load_data(model.bounds)

    def load_classifier(self) -> tuple[Classifier, Data]:
        """`load` where gradients are needed."""
        from robust.classifier import Classifier

        if not self.deployed:
            model, data = self.load()
            if isinstance(model, Classifier):
                return model, data
        raise ConfigError(f"{self.model} gives answers only; this needs the model itself")


def make_subject(
    model: str | None,
    data: str | None,
    norm: str,
    eps: str | None,
    *,
    n: int,
    seed: int,
    weights: Path | None = None,
    mean: str | None = None,
    std: str | None = None,
    bounds: str = "0,1",
    device: str | None = None,
    data_root: Path | None = None,
    answers: str | None = None,
    budget: int | None = None,
    classes: int | None = None,
    endpoint: Sequence[str] | None = None,
    defense: Sequence[str] | None = None,
) -> Subject:
    """Check what the command line says, before anything is loaded or written; a fault is one `ConfigError` line."""
    if norm not in NORMS:
        raise ConfigError("--norm: " + unknown("norm", norm, list(NORMS)))
    if n < 1:
        raise ConfigError(f"--n: {n} samples cannot be evaluated; give at least 1")
    if seed < 0:
        raise ConfigError(f"--seed: {seed} is negative; give 0 or more")
    for option, path in (("--weights", weights), ("--data-root", data_root)):
        if path is not None and not path.exists():
            raise ConfigError(f"{option}: {path} does not exist")
    if device is not None:  # one that this machine lacks, before data is loaded
        from robust.models import find_device

        find_device(device)
    model = model or DEFAULT_MODEL
    data = data or _data_of(model)
    eps_text = eps or usual_eps(norm, data)
    box = _box(bounds)
    subject = Subject(
        model=model,
        data=data,
        norm=norm,
        eps=_radii(eps_text, norm, box),
        eps_text=eps_text,
        bounds=box,
        n=n,
        seed=seed,
        weights=weights,
        mean=numbers(mean, "--mean") if mean else None,
        std=numbers(std, "--std") if std else None,
        device=device,
        data_root=data_root,
        black_box=black_box(answers, budget, classes, endpoint),
        defenses=make_defenses(defense),
    )
    if subject.defenses and subject.deployed:
        raise ConfigError(
            "--defense wraps a model that is seen whole; leave out --answers and deployed models"
        )
    return subject


def number(text: str, option: str) -> float:
    """A number, infinity included, or a fraction of two such as ``8/255``; anything else is a `ConfigError`."""
    try:
        value = parse_number(text.strip())
    except ConfigError as error:
        raise ConfigError(f"{option}: {error}") from None
    if math.isnan(value):
        raise ConfigError(
            f"{option}: {text.strip()} is not a number; write a decimal or a fraction such as 8/255"
        )
    return value


def numbers(text: str, option: str) -> tuple[float, ...]:
    """A comma list of numbers."""
    return tuple(number(part, option) for part in text.split(","))


def check_precision(precision: str) -> None:
    """Refuse an unknown precision before anything is loaded."""
    if precision not in PRECISIONS:
        raise ConfigError("--precision: " + unknown("precision", precision, list(PRECISIONS)))


def usual_eps(norm: str, data: str) -> str:
    """The radius that papers report for this norm and data, as text."""
    return _EPS.get((norm, data.partition(":")[0]), _EPS[norm, ""])


def _data_of(model: str) -> str:
    """The data a shipped model was trained on; every other model has to be told."""
    if model.startswith("zoo:"):
        from robust.zoo import ENTRIES

        entry = ENTRIES.get(model.removeprefix("zoo:"))
        if entry is not None:
            return entry.data
    raise ConfigError(f"--data is missing: say what {model} classifies, for example --data cifar10")


def _box(text: str) -> tuple[float, float]:
    box = numbers(text, "--bounds")
    if len(box) != 2 or not all(map(math.isfinite, box)) or box[0] >= box[1]:
        raise ConfigError(
            f"--bounds: {text!r} is not a box; write the lowest and the highest input, such as 0,1"
        )
    return box[0], box[1]


def _radii(text: str, norm: str, box: tuple[float, float]) -> tuple[float, ...]:
    radii = sorted({_radius(value, norm, box) for value in numbers(text, "--eps")})
    if len(radii) > 1 and math.isinf(radii[-1]):
        raise ConfigError("--eps: an unbounded radius stands alone; leave inf out of the list")
    return tuple(radii)


def _radius(eps: float, norm: str, box: tuple[float, float]) -> float:
    low, high = box
    if eps <= 0:
        raise ThreatError(
            f"--eps: eps={eps:g} leaves nothing to attack; give a positive radius such as 8/255"
        )
    if norm == "linf" and math.isfinite(eps) and eps > high - low:
        hint = (
            f"did you mean {eps:g}/255?" if high - low == 1 and eps <= 255 else f"it is {high - low:g} wide"
        )
        raise ThreatError(f"--eps: eps={eps:g} is outside the box [{low:g}, {high:g}]; {hint}")
    if norm == "l0" and not (eps.is_integer() or math.isinf(eps)):
        raise ThreatError(f"--eps: eps={eps:g} is not a count of pixels; l0 needs a whole number such as 10")
    return eps


def check_writable(path: Path | None) -> None:
    """Refuse an output that cannot be written, without making anything: its nearest existing folder must take it."""
    if path is None:
        return
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise RunError(f"--out: {folder} is a file, so {path} cannot be written; choose another place")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"--out: {folder} may not be written; choose another place")


def hush() -> None:
    """Silence the warnings that the tables and JSON objects carry anyway, as doubts."""
    from robust.classifier import RobustWarning

    warnings.simplefilter("ignore", RobustWarning)


def percent(fraction: float) -> str:
    """A fraction as people read it."""
    return f"{100 * fraction:.1f} %"


def radius(eps: float) -> str:
    """A radius as people write it."""
    from robust.report_figures import eps_text

    return eps_text(eps)


def show(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print a table of named values under a title."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_table(table)


def print_table(table: Table) -> None:
    """Print through Python's own standard output, where a closed pipe is an error that can be answered."""
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    with console.capture() as captured:
        console.print(table)
    print(captured.get(), end="")
