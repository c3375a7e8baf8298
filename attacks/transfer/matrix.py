"""Who fools whom: the success of every attack from every source model on every target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.transfer.ensembles import How, ensemble
from robust.classifier import Classifier, misclassified
from robust.errors import ModelError, RobustError
from robust.registry import room
from robust.threat import Threat

_BATCH = 64
OTHERS = "others"  # the source that fuses all models but the target
Z95 = 1.959964
Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Cell:
    """One attack from one source on one target.

    Counted are the samples that target and source both classify correctly; of an ensemble of others, those that the
    ensemble and the target do.

    Attributes:
        n, fooled: samples counted, and those that the target misclassifies after the attack.
        gained, lost: of them, fooled by this attack and not by the first one, and the other way round.
    """

    source: str
    target: str
    attack: str
    n: int
    fooled: int
    gained: int
    lost: int

    @property
    def rate(self) -> float:
        """Success, NaN where nothing was counted."""
        return self.fooled / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the rate."""
        return wilson(self.fooled, self.n)

    @property
    def gain(self) -> float:
        """What the rate exceeds the first attack's by, on the same samples."""
        return (self.gained - self.lost) / self.n if self.n else math.nan

    @property
    def gain_error(self) -> float:
        """Half of the 95 % interval of `gain`, which is a mean of paired differences."""
        if not self.n:
            return math.nan
        variance = (self.gained + self.lost) / self.n - self.gain**2
        return Z95 * math.sqrt(max(variance, 0.0) / self.n)

    @property
    def p(self) -> float:
        """McNemar's exact test against the first attack, two-sided."""
        return mcnemar(self.gained, self.lost)

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON; what is not defined is None."""
        low, high = self.interval
        numbers = {
            "rate": self.rate, "low": low, "high": high, "gain": self.gain, "gain_error": self.gain_error,
            "p": self.p,
        }  # fmt: skip
        exact = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return exact | {
            name: round(value, 6) if math.isfinite(value) else None for name, value in numbers.items()
        }


@dataclass(frozen=True)
class TransferTable:
    """The transfer matrix: cells of every attack, source and target, and the conditions.

    Attributes:
        models: name, digest, accuracy on all samples, of every model; sources: their names, and `OTHERS` where fused.
        attacks: hyper-parameters by name, the first being what the others are compared with.
    """

    models: tuple[Mapping[str, Any], ...]
    sources: tuple[str, ...]
    attacks: Mapping[str, Mapping[str, Any]]
    threat: Mapping[str, Any]
    n: int
    seed: int
    cells: tuple[Cell, ...]

    def cell(self, source: str, target: str, attack: str) -> Cell:
        """One of them by its names."""
        for cell in self.cells:
            if (cell.source, cell.target, cell.attack) == (source, target, attack):
                return cell
        raise RobustError(f"the matrix has no cell from {source} on {target} by {attack}")

    def to_dict(self) -> dict[str, Any]:
        """The whole table for JSON."""
        return {
            "models": [dict(model) for model in self.models],
            "sources": list(self.sources),
            "attacks": {name: dict(fields) for name, fields in self.attacks.items()},
            "threat": dict(self.threat),
            "n": self.n,
            "seed": self.seed,
            "cells": [cell.to_dict() for cell in self.cells],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> TransferTable:
        """What `to_dict` gave."""
        names = Cell.__dataclass_fields__
        cells = tuple(Cell(**{name: cell[name] for name in names}) for cell in record["cells"])
        return cls(
            tuple(record["models"]), tuple(record["sources"]), record["attacks"], record["threat"],
            record["n"], record["seed"], cells,
        )  # fmt: skip


def transfer_matrix(
    models: Mapping[str, Classifier],
    x: Tensor,
    y: Tensor,
    threat: Threat,
    attacks: Sequence[str] | Mapping[str, Mapping[str, Any]] = ("pgd", "mifgsm", "difgsm", "vmifgsm"),
    *,
    steps: int = 10,
    fused: How | None = None,
    sources: Sequence[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> TransferTable:
    """The success of points made on every model against every model (Liu et al. 2017, arXiv:1611.02770).

    Each attack makes its strongest points on the source, without asking a target, for the samples that the source
    classifies correctly. A cell counts those of them that the target classifies correctly too. On the source itself
    that is the white-box success.

    Args:
        models: classifiers by name, of one box and the same classes.
        x: (N, C, H, W) in the box; y: (N,) labels.
        threat: what may change.
        attacks: names of `robust list attacks`, or fields by name (``{"mi": {"attack": "mifgsm", "decay": 1.0}}``);
            white-box attacks of a fixed budget. The first is what the others are compared with.
        steps: of every attack that has steps and is not told otherwise.
        fused: "logits", "probabilities" or "loss": for every target, all other models fused are a source too.
        sources: the models that points are made on; all if None.
        seed: keys the attacks' randomness.
        progress: called with the fraction done and a line of text.
    """
    chosen = _attacks(attacks, threat, steps)
    right = _correct(models, x, y)
    names = list(models) if sources is None else list(sources)
    _check(models, names, fused)
    jobs = _jobs(models, names, fused)
    cells: list[Cell] = []
    for k, (source, clf, targets) in enumerate(jobs):
        own = right[source] if source in right else _right(clf, x, y)
        hits: dict[str, dict[str, Tensor]] = {}
        for j, (name, attack) in enumerate(chosen.items()):
            if progress is not None:
                progress((k + j / len(chosen)) / len(jobs), f"{name} on {source}")
            points = _craft(attack, clf, x, y, own, seed)
            hits[name] = {target: ~_right(models[target], points, y) for target in targets}
        cells += [
            _cell(hits, source, target, name, own & right[target]) for name in chosen for target in targets
        ]
    if progress is not None:
        progress(1.0, "done")
    about = tuple(
        {"name": name, "digest": clf.digest(), "accuracy": float(right[name].double().mean())}
        for name, clf in models.items()
    )
    every = (*names, *([OTHERS] if fused is not None else []))
    told = {name: {"attack": _name(attack), **_plain(attack)} for name, attack in chosen.items()}
    return TransferTable(about, every, told, threat.describe(), len(x), seed, tuple(cells))


def _jobs(
    models: Mapping[str, Classifier], names: Sequence[str], fused: How | None
) -> list[tuple[str, Classifier, list[str]]]:
    """Every source by name, and the targets that its points are tried on."""
    jobs = [(name, models[name], list(models)) for name in names]
    for target in models if fused is not None else ():
        rest = [clf for name, clf in models.items() if name != target]
        jobs.append((OTHERS, ensemble(rest, fused or "logits"), [target]))
    return jobs


def _attacks(
    attacks: Sequence[str] | Mapping[str, Mapping[str, Any]], threat: Threat, steps: int
) -> dict[str, Attack]:
    wanted = attacks if isinstance(attacks, Mapping) else {name: {} for name in attacks}
    found: dict[str, Attack] = {}
    for name, given in wanted.items():
        fields = dict(given)
        registered = str(fields.pop("attack", name))
        kind = room("attacks").load(registered)
        if kind.knowledge != "white" or kind.minimum_norm or kind.semantic:
            raise RobustError(
                f"{registered} cannot be transferred; use a white-box attack of a fixed budget, as pgd"
            )
        if "steps" in kind.__dataclass_fields__:
            fields.setdefault("steps", steps)
        found[name] = kind(threat=threat, **fields)
    if not found:
        raise RobustError("the matrix needs at least one attack, such as pgd")
    return found


def _name(attack: Attack) -> str:
    return next(name for name in room("attacks") if room("attacks").load(name) is type(attack))


def _plain(attack: Attack) -> dict[str, Any]:
    return {name: value for name, value in attack.config().items() if name not in ("threat", "until")}


def _check(models: Mapping[str, Classifier], sources: Sequence[str], fused: How | None) -> None:
    if not models:
        raise RobustError("the matrix needs at least one model")
    first = next(iter(models.values()))
    for name, clf in models.items():
        if name == OTHERS:
            raise RobustError(f"no model may be called {OTHERS!r}, which names all others fused")
        if clf.bounds != first.bounds:
            raise ModelError(f"{name} has bounds={clf.bounds}, the first model {first.bounds}; give one box")
        if clf.classes != first.classes:
            raise ModelError(f"{name} has {clf.classes} classes, the first model {first.classes}")
    for name in sources:
        if name not in models:
            raise RobustError(f"source {name!r} is none of the models {', '.join(models)}")
    if fused is not None and len(models) < 3:
        raise RobustError(f"{len(models)} models leave nothing to fuse for each target; give at least 3")


def _correct(models: Mapping[str, Classifier], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    for clf in models.values():
        clf.check(x)
    return {name: _right(clf, x, y) for name, clf in models.items()}


def _right(clf: Classifier, x: Tensor, y: Tensor) -> Tensor:
    """(N,) bool on the CPU: classified correctly by the model itself, in float32."""
    parts = zip(x.split(_BATCH), y.split(_BATCH), strict=True)
    wrong = [misclassified(clf.logits(point), label.to(clf.device)).cpu() for point, label in parts]
    return ~torch.cat(wrong)


def _craft(attack: Attack, clf: Classifier, x: Tensor, y: Tensor, rows: Tensor, seed: int) -> Tensor:
    """The strongest points on a source for some samples; the others stay clean."""
    points, index = x.clone(), rows.nonzero()[:, 0]
    if len(index):
        place = index.to(x.device)
        points[place] = attack(clf, x[place], y[index.to(y.device)], seed=seed, index=index)
    return points


def _cell(
    hits: Mapping[str, Mapping[str, Tensor]], source: str, target: str, attack: str, counted: Tensor
) -> Cell:
    hit, base = hits[attack][target] & counted, hits[next(iter(hits))][target] & counted
    return Cell(
        source, target, attack, int(counted.sum()), int(hit.sum()),
        int((hit & ~base).sum()), int((base & ~hit).sum()),
    )  # fmt: skip


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a binomial proportion; all of [0, 1] where nothing was counted."""
    if n == 0:
        return 0.0, 1.0
    rate, square = successes / n, Z95**2
    centre = (rate + square / (2 * n)) / (1 + square / n)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + square / (4 * n * n)) / (1 + square / n)
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's exact two-sided p of paired outcomes that changed; 1 where none did."""
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(min(gained, lost), gained + lost, 0.5).pvalue)
