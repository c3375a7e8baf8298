"""What attacks share that look for one change of all samples: mini-batches, twins, and how a change is applied."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from robust.attacks.base import Attack, Targets
from robust.attacks.engine import WORTH_A_TWIN
from robust.attacks.query import Answer, Query
from robust.attacks.trial import Trial, targets_of
from robust.classifier import Classifier, misclassified
from robust.cost import Cost
from robust.errors import RobustError
from robust.footprint import measure
from robust.losses import get as get_loss
from robust.rng import Draws, identities
from robust.targets import ranking
from robust.twin import Precision, fast_bfloat16, worth_compiling

RECORDS = 50  # entries of a history, about


class Change(Protocol):
    """A change that was learnt once and fits every sample."""

    def points(self, trial: Trial) -> Tensor:
        """(N, C, H, W) the trial's samples under the change, inside its threat."""
        ...


@dataclass
class History:
    """How a search went: one entry per `every` steps, with the mean loss and the share of its batches that fell.

    Attributes:
        steps: steps of the whole search.
        entries: what is kept: `step`, `loss` (larger is better for the attacker) and `fooled` (a share).
    """

    steps: int
    entries: list[dict[str, float]] = field(default_factory=list)
    _sums: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])

    def add(self, step: int, loss: Tensor, hit: Tensor) -> None:
        """Books one mini-batch of step `step`, counted from 0."""
        finite = loss[loss.isfinite()]
        for k, value in enumerate((float(finite.sum()), float(hit.sum()), float(len(hit)))):
            self._sums[k] += value
        every = max(self.steps // RECORDS, 1)
        if (step + 1) % every == 0 or step + 1 == self.steps:
            total, fooled, count = self._sums
            count = max(count, 1.0)
            self.entries.append({"step": step + 1, "loss": total / count, "fooled": fooled / count})
            self._sums = [0.0, 0.0, 0.0]


@dataclass(frozen=True, kw_only=True)
class UniversalAttack(Attack):
    """The base of attacks that make one change for all samples.

    `fit` finds it on some samples and returns it, to be applied to others. `run`, as every attack's, says what it
    does to the samples themselves. Here `until` has no say over the search, which is one for all samples.

    Attributes:
        steps: gradient steps, each on one mini-batch.
        batch: samples of a mini-batch; their order is keyed by the seed and their identities.
        loss: a name of `robust.losses`, averaged over the samples.
    """

    universal: ClassVar[bool] = True
    heuristic: ClassVar[bool] = True  # what one change can do is no promise about any one sample
    steps: int = 500
    batch: int = 32
    loss: str = "escape"

    def fit(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        targets: int | Targets = None,
        seed: int = 0,
        index: Tensor | None = None,
        precision: Precision = "auto",
        compiled: bool | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Any:
        """The change found on samples x (N, C, H, W) with labels y (N,): a `Perturbation` or a `TrainedPatch`.

        Args:
            targets: the class that every sample is led to, or as in `Attack.run`; None leads away from y.
            seed, index, precision, compiled, progress: as in `Attack.run`.

        Raises:
            RobustError: a wrong shape, class, norm or radius, or no sample at all, in one line.
        """
        return self.fitted(
            self.learn, model, x, y, targets=targets, seed=seed, index=index, precision=precision,
            compiled=compiled, progress=progress,
        )  # fmt: skip

    def fitted(
        self,
        learn: Callable[[Trial], Any],
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        targets: int | Targets,
        seed: int,
        index: Tensor | None,
        precision: Precision,
        compiled: bool | None,
        progress: Callable[[float], None] | None,
    ) -> Any:
        """What `learn` makes of a trial of these samples, with its cost; `fit` says the rest."""
        if isinstance(targets, int):
            targets = torch.full_like(y, targets)
        if len(x) == 0:
            raise RobustError("there is no sample to learn from; give at least one")
        trial, named = self.make_trial(
            model, x, y, targets=targets, seed=seed, index=index, precision=precision, compiled=compiled,
            progress=progress,
        )  # fmt: skip
        started, before = time.perf_counter(), model.cost + Cost()
        with trial.session():
            trial.name_targets(named)
            change = learn(trial)
        cost = model.cost - before
        cost.seconds = time.perf_counter() - started
        change.cost = cost.to_dict()
        return change

    def learn(self, trial: Trial) -> Any:
        """The change that a trial's samples lead to."""
        raise TypeError(f"{type(self).__name__} does not say how it learns")

    def attack(self, trial: Trial) -> None:
        """Learns on the trial's samples and offers what the change makes of them, beside the clean points."""
        change: Change = self.learn(trial)
        trial.twin = None
        loss = get_loss(self.loss)
        rows = torch.arange(len(trial.x), device=trial.x.device)
        offers = [trial.x] if trial.until == "strongest" else []
        for points in (*offers, where_allowed(trial, rows, change.points(trial))):
            scores = trial.clean if points is trial.x else scores_of(trial, points)
            hit, sure = trial.judge(rows, points, scores)
            trial.offer(rows, points, hit, sure, loss(scores, trial.y, trial.targets, trial.clean))

    def check_steps(self) -> None:
        """Refuses hyper-parameters with which nothing is learnt."""
        if min(self.steps, self.batch) < 1:
            raise RobustError(f"steps={self.steps}, batch={self.batch}: each at least 1")

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`; of the samples it learns from, if they are 500."""
        return float(3 * chosen.get("steps", cls.steps) * chosen.get("batch", cls.batch) / 500)


def where_allowed(trial: Trial, rows: Tensor, points: Tensor) -> Tensor:
    """Points of some samples that are as the samples are wherever the trial's mask lets nothing change."""
    return points if trial.mask is None else torch.where(trial.mask[rows], points, trial.x[rows])


def scores_of(trial: Trial, points: Tensor) -> Tensor:
    """(N, K) the model's scores of all samples' points."""
    return torch.cat([trial.answer(Query(part, "logits")).scores for part in points.split(64)])


def batches(
    trial: Trial, size: int, steps: int, among: Tensor | None = None, span: tuple[float, float] = (0.0, 1.0)
) -> Iterator[tuple[int, Tensor]]:
    """(step, rows) of `steps` mini-batches of one size, over one keyed order of the samples after the other.

    Args:
        among: the rows that take part; None for all.
        span: the part of the whole work's progress that these steps are.
    """
    index, device = trial.index if among is None else trial.index[among.cpu()], trial.x.device
    size = min(size, len(index))
    held, epoch = torch.zeros(0, dtype=torch.long), 0
    for step in range(steps):
        while len(held) < size:
            keys = Draws(trial.seed, "order", identities(index), epoch).bits(1)[:, 0]
            held, epoch = torch.cat([held, keys.argsort(stable=True)]), epoch + 1
        rows, held = held[:size], held[size:]
        yield step, rows.to(device) if among is None else among[rows.to(device)]
        trial.progress(span[0] + (span[1] - span[0]) * (step + 1) / steps)


def hasten(trial: Trial, gradients: int) -> None:
    """Has a twin answer from now on, where so many gradients of single samples repay it and the precision allows it.

    A change of all samples is learnt from averages, which bfloat16 leaves as they are; the original has the last word.
    """
    precision = trial.precision
    if precision == "auto":
        fast = "bfloat16" if fast_bfloat16(trial.x.device) else "float32"
        precision = fast if gradients >= WORTH_A_TWIN else "original"
    dtype = {"bfloat16": torch.bfloat16, "float32": torch.float32}.get(precision)
    if dtype is None or not trial.use_twin(dtype):
        trial.twin = None
        return
    assert trial.twin is not None
    trial.twin.compiling = bool(trial.compiled)
    if trial.compiled is None and isinstance(trial.model, Classifier):
        found = measure(trial.model, trial.x)
        on_gpu = trial.x.device.type == "cuda"
        trial.twin.compiling = on_gpu or (found is not None and worth_compiling(gradients * 3 * found.flops))


def uphill(
    trial: Trial, loss: str, rows: Tensor, points: Tensor, aim: int | None = None
) -> tuple[Answer, Tensor]:
    """Scores, loss and input gradient of some samples' points, and which of them are fooled.

    With `aim` the loss leads an untargeted trial's samples to that class; fooled is any that is misclassified.
    """
    own: dict[str, Tensor] = {"y": trial.y[rows]}
    aimed = goal = targets_of(trial.targets, rows)
    if aim is not None:
        aimed = torch.full_like(own["y"], aim)
    if aimed is not None:
        own["target"] = aimed
    if loss == "kl":
        own["reference"] = trial.clean[rows]
    query = Query(points.detach(), "loss_grad", loss=get_loss(loss))
    trial.prepare(query, own)
    answer = trial.answer(query, own)
    return answer, misclassified(answer.scores, own["y"], goal)


def falling(step: int, steps: int) -> float:
    """The share of the step size that step `step` takes: a half cosine from 1 to almost 0."""
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def easiest(trial: Trial) -> int:
    """The class that is the likeliest wrong one of the most samples."""
    rivals = ranking(trial.clean, trial.y)[:, 0]
    return int(torch.bincount(rivals, minlength=trial.classes).argmax())
