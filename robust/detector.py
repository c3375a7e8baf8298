"""What a detector is: a number for every input, the higher the more suspicious, and a threshold with a known price.

A detector learns from clean images (some make noisy or adversarial ones of them), and becomes a `Fitted`; calibrated on
held-out clean images, that one flags at most a chosen fraction of fresh clean ones. It says how it must be attacked
(`differentiable`, `bpda`, `randomised`, `stateful`): `score` has the gradient that an attack which knows of it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.digest import read_json, write_json
from robust.errors import RobustError, RunError
from robust.registry import room
from robust.rng import Draws

Learnt = dict[str, Tensor]
SCHEMA = 1
RECORD, WEIGHTS = "detector.json", "detector.safetensors"
_BATCH = 64


class Detects(Protocol):
    """What an attack that knows of a detector needs of it."""

    @property
    def threshold(self) -> float:
        """Scores above it are flagged."""
        ...

    @property
    def randomised(self) -> bool:
        """Whether a score depends on draws."""
        ...

    def score(
        self, x: Tensor, *, seed: int | None = None, index: Tensor | None = None, step: Tensor | int = 0
    ) -> Tensor:
        """(N,) scores of x (N, C, H, W), with a gradient where x takes one."""
        ...

    def flags(self, x: Tensor, *, index: Tensor | None = None) -> Tensor:
        """(N,) bool: what it would stop."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name, parameters, threshold and declaration."""
        ...


@dataclass(frozen=True, kw_only=True)
class Detector:
    """A method by its hyper-parameters; `fit` makes a `Fitted` of it.

    Attributes:
        name: the registry's name.
        differentiable: autograd through `measure` gives the gradient, almost everywhere.
        bpda: the gradient is a substitute's, since the score's own vanishes or does not exist.
        randomised: a score depends on draws.
        stateful: a score depends on the inputs before it: it watches an account's queries.
        usual_fpr: the fraction of clean inputs that it flags, where nothing else is asked.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "detector"
    differentiable: ClassVar[bool] = True
    bpda: ClassVar[bool] = False
    randomised: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    usual_fpr: ClassVar[float] = 0.05

    def fit(self, clf: Classifier, x: Tensor, y: Tensor | None = None, *, seed: int = 0) -> Fitted:
        """Learns what is usual for `clf` from clean images.

        Args:
            clf: the model that is watched.
            x: (N, C, H, W) clean images in its box.
            y: (N,) their labels; the model's own answers if None.
            seed: keys all that is drawn.

        Raises:
            RobustError: too few images, or a model that has not what the method looks at.
        """
        if not isinstance(clf, Classifier):
            raise RobustError(
                f"{self.name} watches a Classifier, not {type(clf).__name__}; wrap the module first"
            )
        self.require(len(x) >= 1, "there is no image to learn from; give some clean ones")
        clf.check(x)
        x = x.to(clf.device, torch.float32)
        with clf.session():
            labels = _predicted(clf, x) if y is None else y.to(clf.device).long()
            learnt = self.learn(clf, x, labels, seed)
        return Fitted(self, clf, {name: value.detach() for name, value in learnt.items()}, seed=seed)

    def learn(self, clf: Classifier, x: Tensor, y: Tensor, seed: int) -> Learnt:
        """What the scores rest on, as tensors by name; nothing, for methods that only look."""
        return {}

    def measure(self, clf: Classifier, learnt: Mapping[str, Tensor], x: Tensor, draws: Draws) -> Tensor:
        """(N,) scores of x (N, C, H, W), higher where it is more suspicious, with the declared gradient.

        Args:
            learnt: what `learn` gave. draws: the source of all randomness, one row for each of x.
        """
        raise NotImplementedError(f"{type(self).__name__} measures nothing")

    def usual(self, fitted: Fitted, x: Tensor) -> Tensor:
        """(N,) what scores held-out clean images x have; the threshold comes from these."""
        return fitted.score(x)

    def guard(self, fitted: Fitted) -> Any:
        """Of a stateful detector: the model's answers to one account, whose queries it watches."""
        raise RobustError(f"{self.name} looks at single inputs; only a stateful detector guards an account")

    def blinded(self, backend: Any, bounds: tuple[float, float], seed: int) -> Any:
        """Of a stateful detector: whom an attacker asks who knows of it, each query changed on its way to `backend`."""
        raise RobustError(f"{self.name} looks at single inputs; there are no queries to blind")

    @classmethod
    def attacked_by(cls) -> str:
        """How an attack that knows of it goes about it."""
        if cls.stateful:
            return "query blinding"
        ways = [name for name, declared in (("BPDA", cls.bpda), ("EOT", cls.randomised)) if declared]
        return " + ".join(ways) or "autograd"

    def describe(self) -> dict[str, Any]:
        """Name, parameters and declaration, for JSON."""
        parameters = {item.name: getattr(self, item.name) for item in fields(self)}
        flags = ("differentiable", "bpda", "randomised", "stateful")
        return {"name": self.name, "parameters": parameters, **{flag: getattr(self, flag) for flag in flags}}

    def require(self, holds: bool, what: str) -> None:
        """Raises one line, for what makes no sense."""
        if not holds:
            raise RobustError(f"{self.name}: {what}")


@dataclass(frozen=True, eq=False)
class Fitted:
    """A detector that has learnt from clean images of one model.

    Attributes:
        detector: the method. clf: the model it watches. learnt: its tensors.
        seed: keys the noise of a randomised one, with the inputs' identities.
        threshold: scores above it are flagged; infinite before `calibrated`.
        fpr: the fraction of clean inputs that it was calibrated for. held_out: how many of them it saw.
    """

    detector: Detector
    clf: Classifier
    learnt: Learnt = field(repr=False)
    seed: int = 0
    threshold: float = math.inf
    fpr: float | None = None
    held_out: int = 0

    @property
    def name(self) -> str:
        """The registry's name."""
        return self.detector.name

    @property
    def randomised(self) -> bool:
        """Whether a score depends on draws."""
        return self.detector.randomised

    def score(
        self, x: Tensor, *, seed: int | None = None, index: Tensor | None = None, step: Tensor | int = 0
    ) -> Tensor:
        """(N,) float32, the higher the more suspicious; infinite where it is no number.

        Where x takes a gradient, so does the score: the method's own, or the declared substitute's.

        Args:
            x: (N, C, H, W) in the box; for a stateful detector one account's queries, in order.
            seed, index, step: key the draws of a randomised one; by default its own seed, 0…N−1 and 0.
        """
        x = x.to(self.clf.device, torch.float32)
        index = torch.arange(len(x)) if index is None else index
        source = Draws(
            self.seed if seed is None else seed, self.detector.name, index.to(x.device).long(), step
        )
        if not len(x):
            return x.new_zeros(0)
        size = len(x) if self.detector.stateful else _BATCH
        with self.clf.session():
            parts = [
                self.detector.measure(self.clf, self.learnt, part, _some(source, slice(k, k + size)))
                for k, part in zip(range(0, len(x), size), x.split(size), strict=True)
            ]
        scores = torch.cat(parts).float()
        return torch.where(scores.isnan(), torch.inf, scores)

    def flags(self, x: Tensor, *, index: Tensor | None = None) -> Tensor:
        """(N,) bool: inputs that it stops."""
        with torch.no_grad():
            return self.score(x.detach(), index=index) > self.threshold

    def calibrated(self, x: Tensor, fpr: float | None = None) -> Fitted:
        """The same with its threshold set on held-out clean images x (N, C, H, W); see `threshold_at`.

        Args:
            fpr: the fraction of clean inputs that may be flagged; None for the method's usual one.
        """
        fpr = self.detector.usual_fpr if fpr is None else fpr
        with torch.no_grad():
            scores = self.detector.usual(self, x)
        return replace(self, threshold=threshold_at(scores, fpr), fpr=fpr, held_out=len(x))

    def describe(self) -> dict[str, Any]:
        """The method, its threshold, and what that is worth, for JSON."""
        threshold = None if math.isinf(self.threshold) else self.threshold
        told = {"threshold": threshold, "fpr": self.fpr, "held_out": self.held_out, "seed": self.seed}
        return {**self.detector.describe(), **told}

    def save(self, folder: str | Path) -> None:
        """Writes ``detector.json`` and ``detector.safetensors``."""
        from robust.checkpoint import write_tensors

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        write_tensors(place / WEIGHTS, {name: value.cpu() for name, value in self.learnt.items()})
        write_json(place / RECORD, {"schema": SCHEMA, "model": self.clf.digest(), **self.describe()})


def load_detector(folder: str | Path, clf: Classifier) -> Fitted:
    """A detector that `Fitted.save` wrote, for the same model.

    Raises:
        RunError: the folder holds none, or one that learnt from another model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    place = Path(folder)
    told = read_json(place / RECORD)
    try:
        detector = room("defenses").load(told["name"])(**told["parameters"])
        seed, fpr, held_out = told["seed"], told["fpr"], told["held_out"]
        threshold = math.inf if told["threshold"] is None else float(told["threshold"])
        learnt = load_file(place / WEIGHTS, device=str(clf.device))
    except (KeyError, TypeError, OSError, SafetensorError) as error:
        raise RunError(
            f"{place} holds no whole detector: {' '.join(str(error).split())}; save it again"
        ) from None
    if told.get("model") != clf.digest():
        raise RunError(
            f"the detector in {place} learnt from another model than {clf.name}; fit it on this one"
        )
    return Fitted(detector, clf, learnt, seed, threshold, fpr, held_out)


def threshold_at(scores: Tensor, fpr: float) -> float:
    """The threshold above which at most a fraction `fpr` of fresh clean inputs score, on average over held-out sets.

    It is the ⌈(1 − fpr)(n + 1)⌉-th smallest of n held-out scores (split conformal prediction): the guarantee needs only
    that held-out and fresh inputs come from one source. Ties are not flagged.

    Raises:
        RobustError: too few held-out inputs for so small a fraction.
    """
    require_held_out(len(scores), fpr)
    rank = math.ceil((1 - fpr) * (len(scores) + 1) - 1e-9)
    return float(scores.float().sort().values[rank - 1])


def require_held_out(n: int, fpr: float) -> None:
    """Raises one line unless `fpr` is a rate that n held-out images can bound."""
    if not 0 < fpr < 1:
        raise RobustError(f"fpr={fpr:g} is no false-positive rate; give one in (0, 1) such as 0.05")
    least = math.ceil(1 / fpr - 1 - 1e-9)
    if n < least:
        raise RobustError(
            f"{n} held-out images cannot bound a false-positive rate of {fpr:g}; give at least {least}"
        )


def _predicted(clf: Classifier, x: Tensor) -> Tensor:
    return torch.cat([clf.logits(part).argmax(1) for part in x.split(_BATCH)])


def _some(draws: Draws, rows: slice) -> Draws:
    """The source of some rows."""
    step = draws.step[rows] if isinstance(draws.step, Tensor) and draws.step.dim() else draws.step
    return Draws(draws.seed, draws.stream, draws.identity[rows], step)
