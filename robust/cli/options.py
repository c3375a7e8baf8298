"""What commands share: option types, numbers with fractions, and a subject checked before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from robust.errors import ConfigError, ThreatError
from robust.registry import unknown

if TYPE_CHECKING:
    from robust.classifier import Classifier
    from robust.data import Data
    from robust.threat import Threat

NORMS = ("linf", "l2", "l1", "l0")
PRECISIONS = ("auto", "float32")
DEFAULT_MODEL = "zoo:digits"
# The radius the papers report for the data, in the unit of [0, 1] inputs; "" stands for every other data.
_EPS = {
    ("linf", "digits"): "0.1",
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
        metavar="[MODEL]",
        help="zoo:NAME, torchvision:NAME, FILE.py:FACTORY or exported:FILE.pt2; none runs the embedded digits model.",
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
    typer.Option("--std", metavar="A,B,C", help="The model's input deviation, per channel.", show_default=False),
]
Bounds = Annotated[
    str, typer.Option("--bounds", metavar="LOW,HIGH", help="The box of the inputs, before mean and std.")
]
Device = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda or cuda:0; default: the best there is.",
                 show_default=False),
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", metavar="DIR", help="Where named data lies.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Precision = Annotated[str, typer.Option("--precision", metavar="PRECISION", help="auto or float32.")]


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

    def threats(self) -> list[Threat]:
        """One threat per radius, smallest first."""
        from robust.threat import make_threat

        return [make_threat(self.norm, eps) for eps in self.eps]

    def load_data(self) -> Data:
        """The first n samples of the data."""
        from robust.data import load_data

        return load_data(self.data, n=self.n, root=self.data_root)

    def load_model(self, data: Data) -> Classifier:
        """The model, wrapped in its box and normalisation."""
        from robust.models import load_model

        return load_model(
            self.model,
            weights=self.weights,
            mean=self.mean,
            std=self.std,
            bounds=self.bounds,
            device=self.device,
            classes=len(data.classes) or None,
        )


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
    model = model or DEFAULT_MODEL
    data = data or _data_of(model)
    eps_text = eps or usual_eps(norm, data)
    box = _box(bounds)
    return Subject(
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
        std=_positive(numbers(std, "--std"), "--std") if std else None,
        device=_device(device),
        data_root=data_root,
    )


def number(text: str, option: str) -> float:
    """A finite or infinite number, or a fraction of two such as ``8/255``; anything else is a `ConfigError`."""
    above, slash, below = text.strip().partition("/")
    try:
        value = float(above) / float(below) if slash else float(above)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{option}: {text.strip()!r} is not a number; write it like 0.03 or 8/255") from None
    if math.isnan(value):
        raise ConfigError(f"{option}: {text.strip()} is not a number; write it like 0.03 or 8/255")
    return value


def numbers(text: str, option: str) -> tuple[float, ...]:
    """A comma list of numbers."""
    return tuple(number(part, option) for part in text.split(","))


def usual_eps(norm: str, data: str) -> str:
    """The radius that papers report for this norm and data, as text."""
    return _EPS.get((norm, data.partition(":")[0]), _EPS[norm, ""])


def check_precision(precision: str) -> None:
    """Refuse a precision that this version cannot honour."""
    if precision == "bfloat16":
        raise ConfigError("--precision: bfloat16 scouting is not in this version yet; use auto or float32")
    if precision not in PRECISIONS:
        raise ConfigError("--precision: " + unknown("precision", precision, list(PRECISIONS)))


def _data_of(model: str) -> str:
    """The data a zoo model was trained on; every other model has to be told."""
    if model.startswith("zoo:"):
        from robust.zoo import REGISTRY

        entry = REGISTRY.get(model.removeprefix("zoo:"))
        if entry is None:
            raise ConfigError(unknown("zoo model", model.removeprefix("zoo:"), list(REGISTRY)))
    raise ConfigError(f"--data is missing: say what {model} classifies, for example --data cifar10")


def _box(text: str) -> tuple[float, float]:
    box = numbers(text, "--bounds")
    if len(box) != 2 or not all(map(math.isfinite, box)) or box[0] >= box[1]:
        raise ConfigError(f"--bounds: {text!r} is not a box; write the lowest and the highest input, such as 0,1")
    return box[0], box[1]


def _radii(text: str, norm: str, box: tuple[float, float]) -> tuple[float, ...]:
    radii = sorted({_radius(value, norm, box) for value in numbers(text, "--eps")})
    if len(radii) > 1 and math.isinf(radii[-1]):
        raise ConfigError("--eps: an unbounded radius stands alone; leave inf out of the list")
    return tuple(radii)


def _radius(eps: float, norm: str, box: tuple[float, float]) -> float:
    low, high = box
    if eps <= 0:
        raise ThreatError(f"--eps: eps={eps:g} leaves nothing to attack; give a positive radius such as 8/255")
    if norm == "linf" and eps > high - low:
        hint = f"; did you mean {eps:g}/255?" if eps / 255 <= high - low else f"; the box is {high - low:g} wide"
        raise ThreatError(f"--eps: eps={eps:g} is outside the box [{low:g}, {high:g}]{hint}")
    if norm == "l0" and not (eps.is_integer() or math.isinf(eps)):
        raise ThreatError(f"--eps: eps={eps:g} is not a count of pixels; l0 needs a whole number such as 10")
    return eps


def _positive(values: tuple[float, ...], option: str) -> tuple[float, ...]:
    if min(values) <= 0:
        raise ConfigError(f"{option}: {min(values):g} cannot divide the inputs; every value is above 0")
    return values


def _device(text: str | None) -> str | None:
    if text is None or text == "cpu":
        return text
    import torch

    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ConfigError(f"--device: {text!r} is not on this machine; {_devices()}") from None
    return text


def _devices() -> str:
    import torch

    count = torch.cuda.device_count()
    return "use cpu" if not count else f"use cpu or one of {', '.join(f'cuda:{i}' for i in range(count))}"
