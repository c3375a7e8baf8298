"""What every attack is: a frozen dataclass of hyper-parameters that turns points into adversarial points."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from robust.attacks.trial import Trial
from robust.classifier import Classifier, require_box
from robust.cost import Cost
from robust.errors import DataError, RobustError, ThreatError
from robust.oracle import Oracle
from robust.targets import TargetName
from robust.threat import Threat
from robust.track import Track, TrackMode
from robust.twin import Precision, check_precision

if TYPE_CHECKING:
    from robust.rows import Source

Until = Literal["strongest", "broken", "smallest"]
Knowledge = Literal["white", "score", "decision", "transfer"]
Targets = Tensor | TargetName | None


@dataclass(frozen=True)
class Result:
    """What an attack found.

    Attributes:
        x_adv: (N, C, H, W) points of ball ∩ box, in x's dtype and on its device.
        success: (N,) bool: the original model, in float32, misclassifies x_adv (or reaches the target).
        distance: (N,) float64 in the threat's norm.
        cost: what it took.
        notes: what the engine saw on the way, for doubts: counts of rows by name.
        queries: (N,) points asked about each sample, beside one for the clean point; None for white-box attacks.
        track: what happened step by step, where `run` was asked to keep it.
    """

    x_adv: Tensor
    success: Tensor
    distance: Tensor
    cost: Cost
    notes: dict[str, float] = field(default_factory=dict)
    queries: Tensor | None = None
    track: Track | None = None


@dataclass(frozen=True, kw_only=True)
class Attack:
    """The base of all attacks; a subclass adds its hyper-parameters and says how it searches.

    Attributes:
        threat: what may change, and by how much.
        until: "strongest": the highest loss found; "broken": stop a sample at its first success;
            "smallest": the smallest distance found.
    """

    threat: Threat
    until: Until = "strongest"
    knowledge: ClassVar[Knowledge] = "white"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    minimum_norm: ClassVar[bool] = False
    heuristic: ClassVar[bool] = False  # makes no promise to come near the smallest or strongest perturbation
    semantic: ClassVar[bool] = False  # limited by fields of its own; meant for a threat of the whole box
    universal: ClassVar[bool] = False  # one change for all samples: what one gets depends on the others

    def __call__(
        self,
        model: Classifier | Oracle,
        x: Tensor,
        y: Tensor,
        *,
        targets: Targets = None,
        seed: int = 0,
        index: Tensor | None = None,
        precision: Precision = "auto",
    ) -> Tensor:
        """Adversarial points of the shape, dtype and device of x; see `run`."""
        return self.run(model, x, y, targets=targets, seed=seed, index=index, precision=precision).x_adv

    def run(
        self,
        model: Classifier | Oracle,
        x: Tensor,
        y: Tensor,
        *,
        targets: Targets = None,
        seed: int = 0,
        index: Tensor | None = None,
        mask: Tensor | None = None,
        begin: Tensor | None = None,
        precision: Precision = "auto",
        compiled: bool | None = None,
        progress: Callable[[float], None] | None = None,
        track: TrackMode | None = None,
    ) -> Result:
        """Attacks every sample and measures what came out.

        Args:
            model: a Classifier, or an Oracle where the attack needs no gradients.
            x: (N, C, H, W) in the model's box.
            y: (N,) true classes.
            targets: (N,) classes to reach; None to leave y; or "random" (keyed by seed and index), "second"
                or "least-likely", by the clean scores.
            seed: with `index`, the key of all randomness.
            index: (N,) identities of the samples, 0…N−1 if None.
            mask: bool, of a shape that expands to x's: where a sample may change; None for everywhere.
            begin: points like x that attacks which start beyond the decision boundary try first, such as samples of
                the target class.
            precision: "float32": a twin (`robust.twin`) answers in the model's place; "bfloat16": a bfloat16
                twin scouts before it; "auto": either where the work repays it; "original": the model answers itself.
                What counts as success is the original's word in any case.
            compiled: whether a twin's passes are compiled; None where the work repays it.
            progress: called now and then with the fraction done.
            track: "steps": keep every step's loss, gradient norm, prediction and best distance in `Result.track`;
                "best": only where a job's best point became better, which curves against queries need.

        Raises:
            RobustError: a wrong shape, class, norm or radius, in one line.
        """
        trial, named = self.make_trial(
            model, x, y, targets=targets, seed=seed, index=index, precision=precision, compiled=compiled,
            progress=progress,
        )  # fmt: skip
        if len(x) == 0:
            return Result(x.clone(), torch.zeros(0, dtype=torch.bool), torch.zeros(0).double(), Cost())
        trial.mask, trial.begin = _like(x, mask, "mask", trial), _like(x, begin, "begin", trial)
        trial.track = None if track is None else Track(track)
        return self._run(trial, x, named)

    def points(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        seed: int,
        index: Tensor,
    ) -> Tensor:
        """Adversarial points like x for a step of a training, and nothing else: nobody judges what came out.

        Of gradient steps the last point, as the papers on adversarial training have it; of other methods the strongest
        that the search saw. In a training that keeps a twin (`robust.learner`) the twin answers, be it in bfloat16, and
        nobody checks its word.

        Args:
            model, x, y, seed, index: as for `run`.

        Raises:
            RobustError: a wrong shape, class, norm or radius, in one line.
        """
        trial, _ = self.make_trial(model, x, y, targets=None, seed=seed, index=index)
        trial.bare, trial.twin = self.until == "strongest", model.training_twin(trial.x)
        trial.compiled = trial.twin is not None and trial.twin.compiling
        with trial.session():
            self.attack(trial)
            return _cast(trial.finish()[0], x, trial.hit, self.threat, trial.bounds)

    def make_trial(
        self,
        model: Classifier | Oracle,
        x: Tensor,
        y: Tensor,
        *,
        targets: Targets,
        seed: int = 0,
        index: Tensor | None = None,
        precision: Precision = "auto",
        compiled: bool | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> tuple[Trial, str | None]:
        """A checked trial of what `run` was given, and the name of its targets, if they have one."""
        named = targets if isinstance(targets, str) else None
        classes = None if isinstance(targets, str) else targets
        self.validate(model, x, y, classes)
        check_precision(precision)
        if isinstance(model, Classifier):
            model.check(x.float())
        trial = Trial(self, model, x, y, targets=classes, seed=seed, index=index)
        trial.hook, trial.precision, trial.compiled = progress, precision, compiled
        return trial, named

    def _run(self, trial: Trial, x: Tensor, named: str | None) -> Result:
        """The search and what came out, counted and in x's dtype."""
        started, before = time.perf_counter(), _cost(trial.model)
        with trial.session():
            trial.name_targets(named)
            if trial.searching():
                self.attack(trial)
            x_adv, success = trial.finish()
        x_adv = _cast(x_adv, x, success.to(x.device), self.threat, trial.bounds)
        distance = self.threat.distance(x_adv, x).cpu()
        cost = _cost(trial.model) - before
        cost.queries = 0 if self.knowledge == "white" else trial.queries
        cost.seconds = time.perf_counter() - started
        spent = None if self.knowledge == "white" else trial.spent.cpu()
        return Result(x_adv, success.cpu(), distance, cost, trial.notes, spent, trial.track)

    def prepare(
        self,
        model: Classifier | Oracle,
        pool: Tensor | Source,
        *,
        seed: int = 0,
        known: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """The attack with all that it learns once and not from the batch under attack: itself, for most attacks.

        Args:
            model: the target.
            pool: images (N, C, H, W) in the box that the attacker has, without labels.
            seed: keys what is learnt.
            known: what `learned` gave after the same preparation: the model is asked nothing then.
        """
        return self

    def learned(self) -> dict[str, Tensor]:
        """After `prepare`, what it learnt of the model, to be stored; empty where nothing was asked."""
        return {}

    def preparation(self) -> int:
        """The queries that `prepare` asks of the model."""
        return 0

    def attack(self, trial: Trial) -> None:
        """Searches on `trial`, which keeps the best point of every sample."""
        raise TypeError(f"{type(self).__name__} is no complete attack: it does not say how it searches")

    def validate(self, model: Classifier | Oracle, x: Tensor, y: Tensor, targets: Tensor | None) -> None:
        """Raises one line for anything that cannot be attacked."""
        name = type(self).__name__
        if self.until not in ("strongest", "broken", "smallest"):
            raise RobustError(f"until={self.until!r} is unknown; use 'strongest', 'broken' or 'smallest'")
        if not isinstance(model, (Classifier, Oracle)):
            raise RobustError(
                f"{name} attacks a Classifier or an Oracle; wrap the module: Classifier(module)"
            )
        if isinstance(model, Oracle) and self.knowledge == "white":
            raise RobustError(
                f"{name} needs gradients, which an Oracle does not give; use a black-box attack"
            )
        if self.threat.norm not in self.norms:
            raise ThreatError(f"{name} has no {self.threat.norm} form; it knows {', '.join(self.norms)}")
        if not self.threat.bounded and not self.minimum_norm:
            raise ThreatError(f"{name} needs a finite eps; unbounded threats are for minimum-norm attacks")
        _check_points(x, y, targets)
        self.threat.check(model.bounds)
        eps = self.threat.eps
        if isinstance(eps, Tensor) and eps.dim() and len(eps) != len(x):
            raise ThreatError(
                f"eps has {len(eps)} radii for {len(x)} samples; give one number or one per sample"
            )

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """Model passes that a sample costs which survives, about, with these fields: a gradient counts as three."""
        values: dict[str, Any] = {item.name: item.default for item in fields(cls)} | chosen
        passes = float(values.get("queries", 3 * values.get("steps", 1)))
        for factor in ("n_targets", "restarts", "copies"):
            passes *= values.get(factor, 1)
        return passes

    def config(self) -> dict[str, Any]:
        """The hyper-parameters by name, for manifests and leaderboards."""
        values = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "threat"}
        return {**values, "threat": self.threat.describe()}


def _like(x: Tensor, given: Tensor | None, name: str, trial: Trial) -> Tensor | None:
    """A mask or points of x's shape, on the trial's device."""
    if given is None:
        return None
    try:
        whole = given.expand(x.shape) if name == "mask" else given.view(x.shape)
    except RuntimeError:
        raise DataError(f"{name} is {tuple(given.shape)}; it must fit x, which is {tuple(x.shape)}") from None
    if name == "mask":
        return whole.to(trial.x.device).bool()
    require_box(whole, trial.bounds)
    return whole.to(trial.x)


def _check_points(x: Tensor, y: Tensor, targets: Tensor | None) -> None:
    if x.dim() < 2 or not x.is_floating_point():
        raise DataError(f"x is {tuple(x.shape)} of {x.dtype}; attacks take floating-point (N, C, H, W)")
    for name, classes in (("y", y), ("targets", targets)):
        if classes is None:
            continue
        if classes.shape != (len(x),) or classes.is_floating_point():
            raise DataError(
                f"{name} is {tuple(classes.shape)} of {classes.dtype}; it must be integers ({len(x)},)"
            )
        if len(classes) and int(classes.min()) < 0:
            raise DataError(f"{name} holds the class {int(classes.min())}; classes are 0, 1, …")


def _cost(model: Classifier | Oracle) -> Cost:
    """A copy of the counts; those of an oracle's classifier are the ones that grow."""
    source = model.backend if isinstance(model, Oracle) and isinstance(model.backend, Classifier) else model
    return source.cost + Cost()


def _cast(x_adv: Tensor, x: Tensor, success: Tensor, threat: Threat, bounds: tuple[float, float]) -> Tensor:
    """Back to x's dtype; a point that its rounding pushes out of the ball returns to the clean one."""
    if x.dtype == x_adv.dtype:
        return x_adv.to(x.device)
    cast = x_adv.to(device=x.device, dtype=x.dtype)
    stays = threat.inside(cast, x, bounds)
    success &= stays
    return torch.where(stays.view(-1, *[1] * (x.dim() - 1)), cast, x)
