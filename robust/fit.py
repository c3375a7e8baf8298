"""The one training loop: keyed shuffling, schedules, averaged weights, checkpoints, and an exact resume after a kill.

What is trained for is a `Loss` or a `robust.recipe.Recipe`. Every number the loop draws is a function of
(seed, epoch, sample) or (seed, step), so that a run that was killed and resumed ends, on a CPU, with the same
bits as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robust import __version__
from robust.checkpoint import (
    RECORD,
    WEIGHTS,
    Place,
    load_checkpoint,
    prepare_folder,
    save_checkpoint,
    write_tensors,
)
from robust.classifier import Classifier
from robust.digest import write_json
from robust.errors import DataError, RunError
from robust.optimise import Average, Optimizer, Schedule, Settings, make_optimizer
from robust.recipe import Loss, Memory, Plain, Recipe, described, warn_of_new_doubts
from robust.rng import derive

if TYPE_CHECKING:
    from robust.data import Data

Augmentation = Callable[[Tensor, Tensor, int], Tensor]
Validation = Callable[[Classifier], Mapping[str, float]]


class Learner(Classifier):
    """A classifier in training: a call runs in the module's own mode, and its gradients reach the weights.

    Inside `session` (attacks, measurements) it is the classifier that it will be: evaluation mode, frozen weights.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of x (B, C, H, W) in the box, with a graph to the weights outside a session."""
        return self._forward(x)

    def logits(self, x: Tensor) -> Tensor:
        """Logits as the finished classifier would give them, without a graph."""
        with self.session(), torch.no_grad():
            return self._forward(x)


@dataclass(frozen=True)
class Progress:
    """Where a training stands: what `progress` is called with after every step."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    seconds_left: float


@dataclass
class FitResult:
    """A finished training.

    Attributes:
        classifier: the trained classifier (the given module, trained in place).
        history: one entry per epoch: epoch, loss, lr, and what `valid` measured.
        seconds: time spent, over all interruptions.
        settings: what the loop was told.
        record: what `train.json` says: settings, data, history, versions.
        out: the run folder, if any.
    """

    classifier: Classifier
    history: list[dict[str, float]]
    seconds: float
    settings: Settings
    record: dict[str, Any]
    out: Path | None


def fit(
    model: nn.Module | Classifier,
    data: Data | tuple[Tensor, Tensor],
    *,
    loss: Loss | Recipe,
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    optimizer: Optimizer = "adam",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    schedule: Schedule = "cosine",
    warmup: float = 0.0,
    cycles: int = 1,
    milestones: tuple[float, ...] = (0.5, 0.75),
    gamma: float = 0.1,
    ema: float | None = None,
    seed: int = 0,
    channels_last: bool = False,
    augment: Augmentation | None = None,
    device: str | torch.device | None = None,
    valid: Data | tuple[Tensor, Tensor] | Validation | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    progress: Callable[[Progress], None] | None = None,
    record: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train `model` in place on `data` for `loss`; see `robust.optimise.Settings` for the numbers of the walk.

    Args:
        model: a module that returns logits, or a `Classifier` (which knows box and normalisation).
        data: a `Data`, or (x, y): x (N, C, H, W) in the box, or uint8 for [0, 1]; y (N,) labels.
        loss: a recipe, or any callable ``loss(clf, x, y, index, epoch_seed)``.
        augment: ``augment(x, index, epoch_seed)``, for example `robust.augment.Augment(crop=4, flip=True)`.
        device: where a bare module is trained; a `Classifier` has its own.
        valid: held-out data, whose accuracy goes into the history, or a callable that measures the classifier.
        out: run folder: `model.safetensors` and `train.json` at the end, a checkpoint from time to time.
        resume: continue from the checkpoint in `out`; a folder without one is started in.
        checkpoint_seconds: time between two checkpoints.
        progress: called after every step.
        record: what `train.json` should say besides, for example the configuration of the run.

    Raises:
        RunError: the loss became NaN or infinite, or `out` cannot be written or resumed.
    """
    settings = Settings(
        epochs, batch_size, lr, optimizer, momentum, weight_decay, schedule, warmup, cycles,
        tuple(milestones), gamma, ema, seed, channels_last,
    )  # fmt: skip
    given = model if isinstance(model, Classifier) else Classifier(model, device=device)
    x, y = load_samples(data)
    training = _Training(given, x, y, settings, loss, augment, valid)
    folder = None if out is None else prepare_folder(out, resume)
    training.run(folder, checkpoint_seconds, progress)
    summary = training.summary(folder, record or {})
    place = training.place
    return FitResult(given, place.history, place.seconds, settings, summary, folder)


def load_samples(data: Data | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(x, y) in memory; x as uint8 where it holds nothing but multiples of 1/255, which is a quarter of the size."""
    x, y = data if isinstance(data, tuple) else data.tensors()
    if len(x) == 0 or len(x) != len(y):
        raise DataError(f"{len(x)} inputs and {len(y)} labels cannot be trained on; give one label per input")
    if y.dim() != 1 or y.is_floating_point() or int(y.min()) < 0:
        raise DataError(
            f"labels are {y.dtype} of shape {tuple(y.shape)}; they must be class numbers (N,) from 0"
        )
    return (x if x.dtype == torch.uint8 else _packed(x)), y.long()


def _packed(x: Tensor) -> Tensor:
    small = torch.empty(x.shape, dtype=torch.uint8)
    for rows, target in zip(x.split(1024), small.split(1024), strict=True):
        target.copy_((rows * 255).round().clamp(0, 255))
        if not torch.equal(target.float() / 255, rows.float().cpu()):
            return x.float()
    return small


class _Training:
    """One training: what it works on, and the steps of its loop."""

    def __init__(
        self,
        given: Classifier,
        x: Tensor,
        y: Tensor,
        settings: Settings,
        loss: Loss | Recipe,
        augment: Augmentation | None,
        valid: Data | tuple[Tensor, Tensor] | Validation | None,
    ) -> None:
        mean, std = given.mean.flatten().tolist(), given.std.flatten().tolist()
        self.settings, self.described = settings, described(loss)
        self.recipe = loss if isinstance(loss, Recipe) else Plain(loss)
        self.clf = Learner(given.module, given.bounds, mean, std, given.device, given.name)
        self.module = given.module
        self.check(x, y)
        self.x, self.y = x.to(given.device), y.to(given.device)
        self.augment, self.valid = augment, valid
        if settings.channels_last:
            self.module.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(settings, self.module)
        self.average = Average(self.module, settings.ema) if settings.ema is not None else None
        # A last batch of one sample joins the one before it: batch normalisation cannot be trained on one.
        alone = len(x) > settings.batch_size and len(x) % settings.batch_size == 1
        self.repeats = self.recipe.repeats
        self.per_epoch = (math.ceil(len(x) / settings.batch_size) - alone) * self.repeats
        self.place = Place()
        self.memory: Memory = {}
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raises one line unless the model takes such inputs and has an output for every label."""
        if x.dtype != torch.uint8:
            self.clf.require_box(x)
        first = x[:16].float() / 255 if x.dtype == torch.uint8 else x[:16]
        with self.clf.session():
            self.clf.check(first)
        if int(y.max()) >= self.clf.classes:
            raise DataError(f"a label is {int(y.max())}, but {self.clf.name} has {self.clf.classes} classes")
        self.recipe.check(self.clf, first)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.settings.epochs * self.per_epoch

    def identity(self) -> dict[str, Any]:
        """What two trainings must share for one to continue the other."""
        digest = hashlib.sha256(self.x.cpu().numpy().tobytes() + self.y.cpu().numpy().tobytes())
        return {
            **asdict(self.settings),
            "loss": self.described,
            "augment": described(self.augment),
            "data": f"{tuple(self.x.shape)} sha256:{digest.hexdigest()}",
            "model": type(self.module).__qualname__,
        }

    def run(
        self, folder: Path | None, checkpoint_seconds: float, progress: Callable[[Progress], None] | None
    ) -> None:
        """All steps from the checkpoint, if any, to the end; the module is left in the mode it was found in."""
        identity = self.identity() if folder is not None else {}
        if folder is not None:
            self.place, self.memory = load_checkpoint(
                folder, identity, self.module, self.optimizer, self.average
            )
        modes = [(module, module.training) for module in self.module.modules()]
        devices = [self.clf.device] if self.clf.device.type == "cuda" else []
        begun, saved = time.monotonic() - self.place.seconds, time.monotonic()
        try:
            with torch.random.fork_rng(devices):
                while self.place.step < self.steps:
                    loss, rate = self.advance()
                    self.place.seconds = time.monotonic() - begun
                    due = time.monotonic() - saved >= checkpoint_seconds
                    if folder is not None and (due or self.place.step == self.steps):
                        save_checkpoint(
                            folder,
                            self.place,
                            identity,
                            self.module,
                            self.optimizer,
                            self.average,
                            self.memory,
                        )
                        saved = time.monotonic()
                    if progress is not None:
                        progress(self.event(loss, rate))
        finally:
            for module, training in modes:
                module.training = training
        if self.average is not None:
            self.module.load_state_dict(self.average.state)
        if self.settings.channels_last:
            self.module.to(memory_format=torch.contiguous_format)

    def summary(self, folder: Path | None, record: Mapping[str, Any]) -> dict[str, Any]:
        """What was trained, on what, how, when and with which versions; written, with the weights, to `folder`."""
        found = {
            **record,
            "schema": 1,
            "training": self.identity(),
            "history": self.place.history,
            "warnings": self.recipe.doubts(self.place.history),
            "seconds": self.place.seconds,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": str(self.clf.device),
            "threads": torch.get_num_threads(),
            "versions": {
                "robust": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }
        if folder is not None:
            write_tensors(folder / WEIGHTS, self.module.state_dict())
            found["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
            write_json(folder / RECORD, found)
        return found

    def advance(self) -> tuple[float, float]:
        """One step, and the end of the epoch if it was its last; its loss and learning rate."""
        step, seed = self.place.step, self.settings.seed
        epoch, number = divmod(step, self.per_epoch)
        rows = self.rows(epoch, number)
        rate = self.settings.learning_rate(step, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(derive(seed, "step", step))  # dropout and whatever else the module draws
        self.module.train()
        value = self.descend(rows, derive(seed, "epoch", epoch), step)
        if self.average is not None:
            self.average.update(self.module, step)
        self.place.step += 1
        self.place.loss_sum += value * len(rows)
        if number == self.per_epoch - 1:
            self.finish_epoch(epoch, rate)
        return value, rate

    def rows(self, epoch: int, number: int) -> Tensor:
        """The samples (B,) of batch `number` in `epoch`."""
        if self.order[0] != epoch:
            generator = torch.Generator().manual_seed(derive(self.settings.seed, "shuffle", epoch))
            self.order = epoch, torch.randperm(len(self.x), generator=generator)
        batch, batches = number // self.repeats, self.per_epoch // self.repeats
        start = batch * self.settings.batch_size
        stop = len(self.x) if batch == batches - 1 else start + self.settings.batch_size
        return self.order[1][start:stop].to(self.x.device)

    def descend(self, rows: Tensor, epoch_seed: int, step: int) -> float:
        """One descent on the loss of some samples; the loss before it."""
        x, y = self.samples(rows)
        if self.augment is not None:
            x = self.augment(x, rows, epoch_seed)
        recipe = self.recipe.at(step / self.per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        value, memory = recipe.step(self.clf, x, y, rows, epoch_seed, self.memory)
        number = float(value.detach())
        if not math.isfinite(number):
            where = f"epoch {step // self.per_epoch + 1}, step {step + 1}"
            raise RunError(
                f"the loss became {number} in {where}; lower the learning rate (lr={self.settings.lr:g})"
            )
        value.backward()
        self.optimizer.step()
        self.memory = memory
        return number

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs in the box, not augmented, and labels of some samples."""
        x = self.x[rows]
        return (x.float() / 255 if x.dtype == torch.uint8 else x), self.y[rows]

    def finish_epoch(self, epoch: int, rate: float) -> None:
        """Enter the epoch into the history, with what the validation measures on the weights it would end with."""
        entry = {"epoch": epoch + 1.0, "loss": self.place.loss_sum / (len(self.x) * self.repeats), "lr": rate}
        self.place.loss_sum = 0.0
        if self.valid is not None:
            averaged = nullcontext() if self.average is None else self.average.applied(self.module)
            with averaged:
                entry |= self.valid(self.clf) if callable(self.valid) else _accuracy(self.clf, self.valid)
        self.place.history.append(entry | self.probed(epoch))
        warn_of_new_doubts(self.recipe, self.place.history)

    def probed(self, epoch: int) -> dict[str, float]:
        """What the recipe measures on its training samples, the same ones after every epoch."""
        generator = torch.Generator().manual_seed(derive(self.settings.seed, "probe"))
        rows = torch.randperm(len(self.x), generator=generator)[: self.recipe.probed].to(self.x.device)
        recipe, seed = self.recipe.at(epoch + 1), derive(self.settings.seed, "probe", epoch)
        return recipe.probe(self.clf, *self.samples(rows), rows, seed)

    def event(self, loss: float, lr: float) -> Progress:
        """Where the training stands after the step just taken."""
        step = self.place.step
        return Progress(
            epoch=(step - 1) // self.per_epoch + 1,
            epochs=self.settings.epochs,
            step=step,
            steps=self.steps,
            loss=loss,
            lr=lr,
            seconds=self.place.seconds,
            seconds_left=self.place.seconds / step * (self.steps - step),
        )


def _accuracy(clf: Classifier, data: Data | tuple[Tensor, Tensor]) -> dict[str, float]:
    return {"valid_accuracy": accuracy(clf, data)}


def accuracy(clf: Classifier, data: Data | tuple[Tensor, Tensor], batch_size: int = 256) -> float:
    """The fraction of `data` that `clf` classifies correctly."""
    x, y = load_samples(data)
    right = 0
    for inputs, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        scale = 255 if inputs.dtype == torch.uint8 else 1
        right += int((clf.logits(inputs.float() / scale).argmax(1).cpu() == labels.cpu()).sum())
    return right / len(x)
