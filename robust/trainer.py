"""The steps of a training: batches, descents, epochs, checkpoints, and what is measured between them."""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust import __version__
from robust.boards import Board
from robust.checkpoint import (
    RECORD,
    WEIGHTS,
    Place,
    below,
    load_checkpoint,
    named,
    save_checkpoint,
    write_tensors,
)
from robust.classifier import Classifier
from robust.digest import write_json
from robust.errors import ConfigError, DataError, RunError
from robust.learner import Learner
from robust.optimise import Average, Settings, load_state_tensors, make_optimizer, state_tensors
from robust.parallel import Group
from robust.recipe import Loss, Memory, Plain, Recipe, described, warn_of_new_doubts
from robust.rng import derive
from robust.samples import accuracy, in_box

if TYPE_CHECKING:
    from robust.data import Data

Augmentation = Callable[[Tensor, Tensor, int], Tensor]
Validation = Callable[[Classifier], Mapping[str, float]]

_MODEL, _AVERAGE, _OPTIMIZER, _MEMORY, _KEPT = "model/", "average/", "optimizer/", "recipe/", "kept/"


@dataclass(frozen=True)
class Progress:
    """Where a training stands: what `progress` is called with after every step.

    The loss is measured on training samples: a private training's has no noise, and is for its owner's eyes only.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    seconds_left: float


@dataclass(frozen=True)
class Watch:
    """What is measured after every epoch, and what follows from it.

    Attributes:
        valid: held-out data, whose accuracy is measured, or a callable that measures the classifier.
        keep: the number whose largest value decides which epoch's weights are kept; None for the last epoch.
    """

    valid: Data | tuple[Tensor, Tensor] | Validation | None = None
    keep: str | None = None

    def measure(self, clf: Classifier) -> dict[str, float]:
        """The numbers, by name."""
        if self.valid is None:
            return {}
        if callable(self.valid):
            return dict(self.valid(clf))
        return {"valid_accuracy": accuracy(clf, self.valid)}

    def best(self, history: list[dict[str, float]]) -> int:
        """The number, from 0, of the best epoch so far: the first of equals.

        Raises:
            ConfigError: nothing that is measured has that name.
        """
        if self.keep is None or not history:
            return len(history) - 1
        if self.keep not in history[-1]:
            raise ConfigError(
                f"keep={self.keep} is not measured; an epoch has {', '.join(history[-1])}: choose one of them"
            )
        values = [entry[self.keep] for entry in history]
        return values.index(max(values))


class Training:
    """One training: what it works on, and the steps of its loop.

    Attributes:
        secret: whether checkpoints are for their owner's eyes only.
    """

    secret = False

    def __init__(
        self,
        given: Classifier,
        x: Tensor,
        y: Tensor,
        settings: Settings,
        loss: Loss | Recipe,
        augment: Augmentation | None = None,
        watch: Watch = Watch(),
        group: Group = Group(),  # noqa: B008  frozen
    ) -> None:
        self.settings, self.described = settings, described(loss)
        self.recipe = loss if isinstance(loss, Recipe) else Plain(loss)
        if settings.compiled and self.recipe.second_order:
            raise ConfigError(
                f"compiled=true cannot be trained with: {type(self.recipe).__name__} with these options differentiates "
                "a gradient, which compiled passes cannot; leave it out"
            )
        self.clf = Learner(given, settings.precision, settings.compiled)
        self.module = given.module
        self.check(x, y)
        self.x, self.y = x.to(given.device), y.to(given.device)
        self.augment, self.watch, self.group = augment, watch, group
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
        self.kept: dict[str, Tensor] = {}
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

    def check(self, x: Tensor, y: Tensor) -> None:
        """Raises one line unless the model takes such inputs and has an output for every label."""
        if x.dtype != torch.uint8:
            self.clf.require_box(x)
        first = in_box(x[:16])
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
            "keep": self.watch.keep,
            "data": f"{tuple(self.x.shape)} sha256:{digest.hexdigest()}",
            "model": type(self.module).__qualname__,
        }

    def told(self, identity: dict[str, Any]) -> dict[str, Any]:
        """What the record, and the checkpoint of a training that is over, say of the identity."""
        return identity

    @property
    def more(self) -> bool:
        """Whether there is a step to take."""
        return self.place.step < self.steps

    def closing(self) -> AbstractContextManager[None]:
        """Around everything that is done with this training; what it did to the module, besides training it, ends."""
        return nullcontext()

    @contextmanager
    def opened(self, folder: Path | None, identity: dict[str, Any]) -> Iterator[None]:
        """Around all steps, after a checkpoint was taken up."""
        yield

    def save(self, folder: Path, identity: dict[str, Any], **chosen: Any) -> None:
        """Write a checkpoint."""
        save_checkpoint(folder, self.place, identity, self.state(**chosen), secret=self.secret)

    def run(
        self,
        folder: Path | None,
        checkpoint_seconds: float,
        progress: Callable[[Progress], None] | None,
        tensorboard: bool = False,
    ) -> None:
        """All steps from the checkpoint, if any, to the end; the module is left in the mode it was found in."""
        self.group.spread(self.module)
        identity = {} if folder is None else self.identity()
        if folder is not None:
            self.place = load_checkpoint(folder, identity, self.restore, self.told(identity))
        writes = self.group.writes
        board = Board(folder / "tensorboard", self.place.step) if tensorboard and folder and writes else None
        modes = [(module, module.training) for module in self.module.modules()]
        devices = [self.clf.device] if self.clf.device.type == "cuda" else []
        begun, saved = time.monotonic() - self.place.seconds, time.monotonic()
        try:
            with self.opened(folder, identity), torch.random.fork_rng(devices):
                while self.more:
                    epochs = len(self.place.history)
                    loss, rate = self.advance()
                    self.place.seconds = time.monotonic() - begun
                    due = time.monotonic() - saved >= checkpoint_seconds
                    if folder is not None and writes and (due or self.place.step == self.steps):
                        self.save(folder, identity)
                        saved = time.monotonic()
                    if board is not None and len(self.place.history) > epochs:
                        board.write(self.place.history[-1], self.place.step)
                    if progress is not None and writes:
                        progress(self.event(loss, rate))
        finally:
            if board is not None:
                board.close()
            for module, training in modes:
                module.training = training
        if self.watch.keep is not None and self.kept:
            self.module.load_state_dict(self.kept)
        elif self.average is not None:
            self.module.load_state_dict(self.average.state)
        if self.settings.channels_last:
            self.module.to(memory_format=torch.contiguous_format)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on, besides the place."""
        average = {} if self.average is None else self.average.state
        return {
            **named(_MODEL, self.module.state_dict()),
            **named(_OPTIMIZER, state_tensors(self.optimizer)),
            **named(_AVERAGE, average),
            **named(_MEMORY, self.memory),
            **named(_KEPT, self.kept),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        self.module.load_state_dict(below(_MODEL, tensors))
        load_state_tensors(self.optimizer, below(_OPTIMIZER, tensors))
        if self.average is not None:
            self.average.load(below(_AVERAGE, tensors))
        self.memory, self.kept = below(_MEMORY, tensors), below(_KEPT, tensors)

    def summary(self, folder: Path | None, record: Mapping[str, Any]) -> dict[str, Any]:
        """What was trained, on what, how, when and with which versions; written, with the weights, to `folder`."""
        found = {
            **record,
            "schema": 1,
            "training": self.told(self.identity()),
            "history": self.place.history,
            "kept_epoch": self.watch.best(self.place.history) + 1,
            "warnings": self.recipe.doubts(self.place.history),
            "seconds": self.place.seconds,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": str(self.clf.device),
            "threads": torch.get_num_threads(),
            "processes": self.group.size,
            "versions": {
                "robust": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }
        found |= self.extras()
        if folder is not None and self.group.writes:
            write_tensors(folder / WEIGHTS, self.module.state_dict())
            found["weights_sha256"] = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
            write_json(folder / RECORD, found)
        return found

    def extras(self) -> dict[str, Any]:
        """What the record says besides."""
        return {}

    def module_seed(self, step: int) -> int:
        """The seed of what the module draws itself in a step, such as dropout."""
        return derive(self.settings.seed, "step", step)

    def advance(self) -> tuple[float, float]:
        """One step, and the end of the epoch if it was its last; its loss and learning rate."""
        step, seed = self.place.step, self.settings.seed
        epoch, number = divmod(step, self.per_epoch)
        rows = self.rows(epoch, number)
        rate = self.settings.learning_rate(step, self.per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(self.module_seed(step))
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
        recipe = self.recipe.at(step / self.per_epoch)
        self.optimizer.zero_grad(set_to_none=True)
        own = self.group.share(rows)
        number = self.group.reduce(self.module, self.climb(recipe, own, epoch_seed), len(own) / len(rows))
        if not math.isfinite(number):
            where = f"epoch {step // self.per_epoch + 1}, step {step + 1}"
            raise RunError(
                f"the loss became {number} in {where}; lower the learning rate (lr={self.settings.lr:g})"
            )
        self.optimizer.step()
        return number

    def climb(self, recipe: Recipe, rows: Tensor, epoch_seed: int) -> float:
        """Leaves the gradients of the mean loss of some samples in the module, taken in parts; that loss."""
        total = 0.0
        parts = min(self.settings.accumulate, max(len(rows) // 2, 1))
        for part in rows.chunk(parts) if len(rows) else ():
            x, y = self.samples(part)
            if self.augment is not None:
                x = self.augment(x, part, epoch_seed)
            value, memory = recipe.step(self.clf, x, y, part, epoch_seed, self.memory)
            if memory and (parts > 1 or self.group.size > 1):
                raise ConfigError(
                    f"{type(recipe).__name__} remembers its last step sample by sample, and a batch comes in parts; "
                    "train it in one process, without accumulate"
                )
            weight = len(part) / len(rows)
            total += float(value.detach()) * weight
            if math.isfinite(total):
                (value * weight).backward()
            self.memory = memory
        return total

    def samples(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs in the box, not augmented, and labels of some samples."""
        return in_box(self.x[rows]), self.y[rows]

    def finish_epoch(self, epoch: int, rate: float) -> None:
        """Enter the epoch into the history, with what the validation measures on the weights it would end with."""
        entry = self.entry(epoch, rate)
        self.place.loss_sum = 0.0
        averaged = nullcontext() if self.average is None else self.average.applied(self.module)
        with averaged:
            entry |= self.group.same(self.watch.measure(self.clf) if self.group.writes else {})
        self.place.history.append(entry | self.group.same(self.probed(epoch) if self.group.writes else {}))
        if self.watch.keep is not None and self.watch.best(self.place.history) == epoch:
            state = self.module.state_dict() if self.average is None else self.average.state
            self.kept = {name: value.detach().clone() for name, value in state.items()}
        warn_of_new_doubts(self.recipe, self.place.history)

    def entry(self, epoch: int, rate: float) -> dict[str, float]:
        """What the history says of an epoch's steps."""
        return {"epoch": epoch + 1.0, "loss": self.place.loss_sum / (len(self.x) * self.repeats), "lr": rate}

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
