"""Models that come by name: the zoo's and torchvision's."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from robust import zoo as rooms
from robust.data.fetch import one_line
from robust.errors import ModelError, UnknownName
from robust.models.weights import fit_weights, outputs, read_weights
from robust.registry import room, unknown

if TYPE_CHECKING:
    from robust.classifier import Classifier


@dataclass(frozen=True)
class Wanted:
    """What the caller asked of a model beyond its spec: see `load_model`."""

    weights: Path | None = None
    classes: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class Source:
    """A model that was found, with the name and the normalisation it brings."""

    module: nn.Module | Classifier
    name: str
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None


def zoo(name: str, wanted: Wanted) -> Source:
    """A shipped model with its weights, or an architecture of the zoo with the caller's."""
    if name not in rooms.ENTRIES and name not in rooms.REGISTRY:
        raise UnknownName(unknown("zoo model", name, sorted({*rooms.ENTRIES, *rooms.REGISTRY})))
    entry = rooms.ENTRIES.get(name)
    make = rooms.get(entry.architecture if entry else name)
    label = f"zoo:{name}"
    if entry is None or wanted.weights or wanted.fresh:
        advice = "give weights=FILE, a safetensors file or a state dict"
        return Source(_architecture(label, lambda classes: make(classes=classes), 10, wanted, advice), label)
    shipped = Wanted(weights=entry.path)
    module = _architecture(label, lambda classes: make(classes=classes), 10, shipped, "")
    return Source(module, label, entry.mean, entry.std)


def torchvision(name: str, wanted: Wanted) -> Source:
    """A classification architecture of torchvision, with weights from a file or torchvision's own ("DEFAULT")."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise UnknownName(unknown("torchvision model", name, known))
    label = f"torchvision:{name}"
    if wanted.weights == Path("DEFAULT"):
        return _pretrained(name, label)

    def make(classes: int) -> nn.Module:
        module: nn.Module = models.get_model(name, weights=None, num_classes=classes)
        return module

    advice = "give weights=FILE, or weights='DEFAULT' to download torchvision's"
    return Source(_architecture(label, make, 1000, wanted, advice), label)


def _pretrained(name: str, label: str) -> Source:
    """torchvision's own weights, with the normalisation they were trained with."""
    from torchvision import models

    weights: Any = models.get_model_weights(name).DEFAULT
    try:
        # the download talks on stdout, where --json wants nothing but its object
        with contextlib.redirect_stdout(sys.stderr):
            module: nn.Module = models.get_model(name, weights=weights)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"{label}: its weights could not be downloaded from {weights.url} ({one_line(error)}); "
            "give them as a file: weights=FILE"
        ) from None
    transforms = weights.transforms()
    return Source(module, label, tuple(transforms.mean), tuple(transforms.std))


def groupnorm(spec: str, wanted: Wanted) -> Source:
    """Another model with GroupNorm in place of batch normalisation, which can be trained privately."""
    from robust.models import find_source

    fix = room("defenses.privacy").load("fix")
    label = f"groupnorm:{spec}"

    def make(classes: int) -> nn.Module:
        found = find_source(spec, Wanted(classes=classes, fresh=True)).module
        if not isinstance(found, nn.Module):
            raise ModelError(f"{label}: {spec} returns a Classifier; give a factory of its module")
        module: nn.Module = fix(found)
        return module

    advice = "give weights=FILE, those of a training with this very model"
    return Source(_architecture(label, make, 10, wanted, advice), label)


def _architecture(
    label: str, make: Callable[[int], nn.Module], usual: int, wanted: Wanted, advice: str
) -> nn.Module:
    """An architecture with the wanted weights, or fresh where that is allowed; weights decide the number of classes."""
    if wanted.classes is not None and wanted.classes < 1:
        raise ModelError(f"{label}: classes={wanted.classes} is no number of classes; give at least 1")
    if wanted.weights is None and not wanted.fresh:
        raise ModelError(f"{label} is an architecture without weights; {advice}")
    classes = wanted.classes or usual
    if wanted.weights is None:
        return make(classes)
    state = read_weights(wanted.weights)
    module = make(classes)
    found = outputs(module, state, classes)
    if found != classes:
        module = make(found)
    fit_weights(module, state, label, wanted.weights)
    return module
