"""Ensemble adversarial training (Tramèr et al. 2018, arXiv:1705.07204)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.defenses.training.adversarial import inner_points
from robust.defenses.training.fgsm_at import FGSMAT
from robust.errors import ModelError, RobustError
from robust.models.named import parse_model
from robust.recipe import require
from robust.rng import Draws


@dataclass(frozen=True, kw_only=True)
class EnsembleAT(FGSMAT):
    """Ensemble adversarial training: steps against static models and the own (Tramèr et al. 2018, arXiv:1705.07204).

    Perturbations of pre-trained models that do not move cannot be answered by bending the own gradient. A sample's
    source, one of the static models or the model in training, is drawn with equal chances and keyed by sample and
    epoch (the paper draws one for each batch); the loss is FGSM adversarial training's. It was made against
    transferred perturbations; white-box robustness is what `robust eval` measures.

    Attributes:
        models: the static models, as ``[NAME=]MODEL[@WEIGHTS][@mean=A,B,C][@std=A,B,C]``; one, or several.
    """

    models: str | tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        require("models", self.models, bool(self.names), 'one or more, such as ["zoo:digits"]')
        for name in self.names:
            parse_model(name)

    @property
    def names(self) -> tuple[str, ...]:
        """The static models' texts."""
        return (self.models,) if isinstance(self.models, str) and self.models else tuple(self.models)

    def static(self, clf: Classifier) -> list[Classifier]:
        """The static models, on the device and in the box of the one in training; loaded once."""
        try:
            return [_load(name, str(clf.device), clf.bounds) for name in self.names]
        except RobustError as error:
            raise ModelError(f"models: {error}; with weights write MODEL@FILE") from None

    def check(self, clf: Classifier, x: Tensor) -> None:
        """Refuses static models that cannot stand beside this one: other inputs, classes or box."""
        super().check(clf, x)
        for name, other in zip(self.names, self.static(clf), strict=True):
            if other.bounds != clf.bounds:
                raise ModelError(
                    f"models: {name} lives in the box {list(other.bounds)}, {clf.name} in {list(clf.bounds)}"
                )
            try:
                other.check(x)
            except RobustError as error:
                raise ModelError(f"models: {name} cannot stand beside {clf.name}: {error}") from None
            if other.classes != clf.classes:
                raise ModelError(
                    f"models: {name} has {other.classes} classes, {clf.name} has {clf.classes}; "
                    "give models of the same task"
                )

    def adversarial(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
        """Each sample's step against its source."""
        sources = [*self.static(clf), clf]
        choice = Draws(seed, "source", index).below(len(sources), 1)[:, 0]
        found = x.clone()
        for number, source in enumerate(sources):
            rows = (choice == number).nonzero()[:, 0]
            if len(rows):
                part = inner_points(self.attack(), source, x[rows], y[rows], index[rows], seed)
                found = found.index_copy(0, rows, part)
        return found


@lru_cache(maxsize=16)
def _load(text: str, device: str, bounds: tuple[float, float]) -> Classifier:
    return parse_model(text).load(bounds=bounds, device=torch.device(device))
