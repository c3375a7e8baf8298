"""A model with its weights, normalisation and name in one text, for commands that take several models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robust.config import number
from robust.errors import ConfigError, ModelError
from robust.models import load_classifier

if TYPE_CHECKING:
    import torch

    from robust.classifier import Classifier

FORM = "[NAME=]MODEL[@WEIGHTS][@mean=A,B,C][@std=A,B,C]"


@dataclass(frozen=True)
class NamedModel:
    """A model as a command line names it: checked, but not loaded yet.

    Attributes:
        name: what tables call it.
        spec: as `load_classifier` takes it.
        weights: a file, or None.
        mean, std: of its normalisation, or None.
    """

    name: str
    spec: str
    weights: Path | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def load(
        self,
        *,
        bounds: tuple[float, float] = (0.0, 1.0),
        device: str | torch.device | None = None,
        classes: int | None = None,
    ) -> Classifier:
        """The classifier, in evaluation mode; see `load_classifier`."""
        clf = load_classifier(
            self.spec, weights=self.weights, mean=self.mean, std=self.std, bounds=bounds, device=device,
            classes=classes,
        )  # fmt: skip
        clf.module.eval()
        clf.name = self.name
        return clf


def parse_model(text: str) -> NamedModel:
    """`resnet=zoo:resnet20@weights.safetensors@mean=0.485,0.456,0.406@std=0.229,0.224,0.225`, name and tail optional.

    Without a name it is the telling end of MODEL: ``zoo:resnet20`` is resnet20.

    Raises:
        ConfigError: a text of another form; ModelError: weights that do not exist.
    """
    name, equals, rest = text.partition("=")
    if not equals or not name or any(sign in name for sign in ":@/."):
        name, rest = "", text
    spec, *tail = rest.split("@")
    weights: Path | None = None
    statistics: dict[str, tuple[float, ...]] = {}
    for part in tail:
        key, equals, value = part.partition("=")
        if equals and key in ("mean", "std"):
            statistics[key] = _numbers(value, key, text)
        elif weights is None and part:
            weights = Path(part)
        else:
            raise ConfigError(f"model {text!r}: {part!r} is not understood; a model is {FORM}")
    if not spec:
        raise ConfigError(f"model {text!r} names no model; a model is {FORM}")
    if weights is not None and not weights.is_file():
        raise ModelError(f"model {text!r}: weights {weights} do not exist")
    ending = (spec.partition(":")[2] or spec).rpartition("/")[2]
    return NamedModel(name or ending, spec, weights, statistics.get("mean"), statistics.get("std"))


def _numbers(value: str, key: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(number(part.strip()) for part in value.split(","))
    except ConfigError as error:
        raise ConfigError(f"model {text!r}: {key}: {error}") from None
