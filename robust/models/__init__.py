"""Models by name: `load_model("zoo:digits")`, `"FILE.py:FACTORY"`, `"onnx:FILE"`, `"https://…"` and others."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robust.errors import ModelError, UnknownName
from robust.registry import Registry

if TYPE_CHECKING:
    import torch

    from robust.classifier import Classifier
    from robust.models.deployed import Endpoint
    from robust.models.sources import Source, Wanted
    from robust.oracle import Answers, Oracle

REGISTRY = Registry(
    "model kind",
    {
        "zoo": "robust.models.sources:zoo",
        "torchvision": "robust.models.sources:torchvision",
        "exported": "robust.models.exported:exported",
        "groupnorm": "robust.models.sources:groupnorm",
    },
)
get = REGISTRY.load
# Models that run elsewhere than in torch, and give answers only: what is behind these is an Oracle.
DEPLOYED = Registry(
    "deployed model",
    {
        "onnx": "robust.models.onnx:onnx",
        "http": "robust.models.http:http",
        "https": "robust.models.http:https",
    },
)

_NAMED = "zoo:NAME, torchvision:NAME, FILE.py:FACTORY, groupnorm:MODEL, exported:FILE.pt2"
FORMS = f"{_NAMED}, onnx:FILE or an http(s) address"

__all__ = ["DEPLOYED", "REGISTRY", "get", "is_deployed", "load_classifier", "load_model"]


def is_deployed(spec: str) -> bool:
    """Whether a spec names a model that gives answers only."""
    return spec.partition(":")[0] in DEPLOYED


def load_model(
    spec: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    device: str | torch.device | None = None,
    classes: int | None = None,
    fresh: bool = False,
    answers: Answers | None = None,
    budget: int | None = None,
    endpoint: Endpoint | Mapping[str, Any] | None = None,
) -> Classifier | Oracle:
    """A model by its spec: a Classifier; an Oracle where it is deployed, or asked for by `answers` or `budget`.

    Args:
        spec: `zoo:NAME` (a shipped model with its weights, or an architecture), `torchvision:NAME` (an architecture),
            `FILE.py:FACTORY` (a callable without arguments that returns a module, or a Classifier, which is taken as
            it is), `groupnorm:MODEL` (one of these with GroupNorm for batch normalisation, as private training wants
            it), `exported:FILE.pt2` (saved by `torch.export.save`), `onnx:FILE` (run by ONNX Runtime;
            `onnx:FILE#NAME` names the output with the scores) or the address of an endpoint, `http(s)://…`, which
            takes what `robust.wire` says, as `robust serve` does. Python files and exported programs run.
        weights: a safetensors file or a state dict, which is read with `weights_only=True`; for torchvision also
            "DEFAULT", its own weights, downloaded.
        mean, std: of the normalisation inside the model, one number or one per channel, in the unit of `bounds`. If
            neither is given, a shipped or downloaded model brings its own.
        bounds: the box that inputs live in.
        device: "cpu", "cuda", "cuda:1", ...; the GPU if None and there is one.
        classes: the number of outputs of an architecture that starts without weights (weights bring their own), or
            of classes where an oracle gives labels only.
        fresh: start an architecture from its random initialisation (torch's global generator), for training.
        answers: "scores" or "labels", for an Oracle; an endpoint may say itself what it gives.
        budget: the most queries the Oracle may answer.
        endpoint: settings of an http(s) model: timeout, retries, rate, batch and auth (`robust.models.deployed`).

    Raises:
        UnknownName: for an unknown kind or name, with the nearest known ones.
        ModelError: for a model that cannot be found, built, read or reached, and for an absent device.
    """
    statistics = _numbers(mean, "mean"), _numbers(std, "std")
    if is_deployed(str(spec)):
        if weights is not None or fresh:
            raise ModelError(f"{spec} has its own weights; leave out weights={weights} and fresh={fresh}")
        asked: dict[str, Any] = {"answers": answers, "budget": budget, "classes": classes}
        asked["bounds"] = (float(bounds[0]), float(bounds[1]))
        asked |= {
            "mean": statistics[0],
            "std": statistics[1],
            "device": None if device is None else str(device),
        }
        return _deployed(str(spec), asked, endpoint)
    if endpoint is not None:
        raise ModelError(f"{spec} is no endpoint; settings of one are for http(s) models")
    clf = _here(str(spec), weights, classes, fresh, statistics, bounds, find_device(device))
    return _behind(clf, answers, budget, classes)


def _here(
    spec: str,
    weights: str | os.PathLike[str] | None,
    classes: int | None,
    fresh: bool,
    statistics: tuple[Any, Any],
    bounds: tuple[float, float],
    place: torch.device | None,
) -> Classifier:
    """The classifier behind a spec of a model that runs in torch."""
    from robust.classifier import Classifier
    from robust.models.sources import Wanted

    source = find_source(spec, Wanted(Path(weights) if weights is not None else None, classes, fresh))
    if isinstance(source.module, Classifier):
        return _as_it_is(source.module, spec, statistics, bounds, place)
    if statistics == (None, None):
        statistics = source.mean, source.std
    if not fresh and source.module.training:
        with suppress(NotImplementedError):  # an exported program has no modes
            source.module.eval()
    return Classifier(
        source.module, bounds=bounds, mean=statistics[0], std=statistics[1], device=place, name=source.name
    )


def load_classifier(spec: str, **options: Any) -> Classifier:
    """`load_model` where weights and gradients are needed; a deployed model is refused."""
    from robust.classifier import Classifier

    if not is_deployed(spec):
        model = load_model(spec, **options)
        if isinstance(model, Classifier):
            return model
    raise ModelError(f"{spec} gives answers only; this needs the model itself, its weights and gradients")


def _behind(
    clf: Classifier, answers: Answers | None, budget: int | None, classes: int | None
) -> Classifier | Oracle:
    """The classifier itself, or its answers alone where they were asked for."""
    from robust.oracle import Oracle

    if answers is None and budget is None:
        return clf
    return Oracle(clf, answers=answers or "scores", budget=budget, classes=classes)


def _deployed(spec: str, asked: Mapping[str, Any], endpoint: Endpoint | Mapping[str, Any] | None) -> Oracle:
    """The oracle behind a spec of `DEPLOYED`; `asked` are the fields of `robust.models.deployed.Asked`."""
    from robust.config import from_mapping
    from robust.models.deployed import Asked, Endpoint

    kind, _, rest = spec.partition(":")
    if not rest.strip("/"):
        raise ModelError(f"model {spec!r} lacks what stands behind the colon; a model is {FORMS}")
    if endpoint is not None and kind == "onnx":
        raise ModelError(f"{spec} is no endpoint; settings of one are for http(s) models")
    settings = (
        endpoint if isinstance(endpoint, Endpoint) else from_mapping(endpoint or {}, Endpoint, "endpoint")
    )
    oracle: Oracle = DEPLOYED.load(kind)(rest, Asked(**asked, endpoint=settings))
    return oracle


def find_device(device: str | torch.device | None) -> torch.device | None:
    """The device if this machine has it; None becomes the GPU where there is one."""
    import torch

    if device is None:
        return torch.device("cuda") if torch.cuda.is_available() else None
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError):
        found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise ModelError(
            f"device {str(device)!r} is not on this machine, which has {', '.join(found)}"
        ) from None
    return place


def find_source(spec: str, wanted: Wanted) -> Source:
    """The model behind a spec of a model that runs in torch, not yet wrapped."""
    kind, colon, rest = spec.partition(":")
    if kind in REGISTRY:
        if not rest:
            raise ModelError(f"model {spec!r} lacks what stands behind the colon; a model is {FORMS}")
        source: Source = get(kind)(rest, wanted)
        return source
    file, colon, factory = spec.rpartition(":")
    if colon and file.endswith(".py"):
        from robust.models.factory import from_file

        return from_file(Path(file).expanduser(), factory, wanted)
    raise UnknownName(f"unknown model {spec!r}; {_advice(spec)}")


def _advice(spec: str) -> str:
    """What a spec of no known kind was perhaps meant to be."""
    from robust import zoo

    suffix = Path(spec).suffix
    if suffix == ".py":
        return f"say which function of the file makes the model: {spec}:FACTORY"
    if suffix == ".pt2":
        return f"did you mean exported:{spec}?"
    if suffix == ".onnx":
        return f"did you mean onnx:{spec}?"
    if suffix in (".pt", ".pth", ".ckpt", ".safetensors"):
        return f"weights need an architecture: give it as the model ({FORMS}), and this file as the weights"
    if spec in (*zoo.ENTRIES, *zoo.REGISTRY):
        return f"did you mean zoo:{spec}?"
    return f"a model is {FORMS}"


def _numbers(values: float | Sequence[float] | None, what: str) -> float | tuple[float, ...] | None:
    """One number or one per channel, finite; a standard deviation above 0."""
    if values is None:
        return None
    try:
        numbers = tuple(float(value) for value in (values if isinstance(values, Sequence) else (values,)))
    except (TypeError, ValueError):
        raise ModelError(f"{what}={values!r} is not a number or a list of numbers, one per channel") from None
    if not numbers or not all(map(math.isfinite, numbers)) or (what == "std" and min(numbers) <= 0):
        right = "above 0" if what == "std" else "finite"
        raise ModelError(f"{what}={values!r} cannot normalise; give one number or one per channel, {right}")
    return numbers if len(numbers) > 1 else numbers[0]


def _as_it_is(
    clf: Classifier,
    spec: str,
    statistics: tuple[object, object],
    bounds: tuple[float, float],
    place: torch.device | None,
) -> Classifier:
    """A factory's own Classifier; options that it settles itself are refused rather than ignored."""
    if statistics != (None, None):
        raise ModelError(f"{spec} returns a Classifier, which normalises for itself; leave out mean and std")
    if tuple(bounds) not in ((0.0, 1.0), tuple(clf.bounds)):
        raise ModelError(f"{spec} returns a Classifier with bounds={clf.bounds}; leave out other bounds")
    if place is not None and place.type != clf.device.type:
        raise ModelError(f"{spec} returns a Classifier on {clf.device}; let the factory put it on {place}")
    return clf
