"""The training loop under differential privacy: Poisson samples in parts, and nothing unnoised in what it writes.

Everything that leaves a run folder after the end (weights, history, record, ledger) is a function of noisy sums. What
is none (losses, probes on training samples, the digest of the data, the noise's seed) is kept from the record. The
checkpoint of an unfinished training holds the seed: it is a secret, readable by its owner only, and the last one
drops it, with the digest of the data.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from robust.checkpoint import below, named
from robust.classifier import Classifier
from robust.errors import ConfigError, RunError
from robust.optimise import Settings
from robust.parallel import Group
from robust.privacy import Privacy, PrivateWalk, finite, refuse
from robust.recipe import Loss, Recipe
from robust.registry import room
from robust.rng import derive
from robust.trainer import Augmentation, Training, Watch

_PRIVATE = "private/"


class PrivateTraining(Training):
    """A training whose steps see only clipped and noisy sums over Poisson samples (`robust.defenses.privacy`).

    An epoch has as many steps as draw each sample once on average. A batch comes in parts of at most
    ``batch_size / accumulate`` samples, which gives the same sum. What a recipe and an augmentation draw is keyed by
    the sample and the step.
    """

    secret = True

    def __init__(
        self,
        given: Classifier,
        x: Tensor,
        y: Tensor,
        settings: Settings,
        loss: Loss | Recipe,
        augment: Augmentation | None,
        watch: Watch,
        group: Group,
        privacy: Privacy,
    ) -> None:
        if isinstance(loss, Recipe):
            refuse(loss, settings, group, len(x))
        super().__init__(given, x, y, settings, loss, augment, watch, group)
        refuse(self.recipe, settings, group, len(x))
        self.privacy = privacy
        self.walk: PrivateWalk = room("defenses.privacy").load("walk")(
            privacy, self.module, self.optimizer,
            count=len(x), batch_size=settings.batch_size, epochs=settings.epochs,
        )  # fmt: skip
        self.per_epoch = self.walk.per_epoch
        self.part = math.ceil(settings.batch_size / settings.accumulate)
        self.known = False

    @property
    def more(self) -> bool:
        """See `Training`; False too where the next step would exceed the budget."""
        return super().more and not self.walk.over and self.walk.fits(self.place.step)

    def identity(self) -> dict[str, Any]:
        """See `Training`; with whatever else changes a sample's gradient, as all of them were paid for together."""
        clf, module = self.clf, self.module
        layers = re.sub(r" at 0x[0-9a-f]+", "", repr(module))  # of a function, another one in every process
        shapes = [
            (name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters()
        ]
        return {
            **super().identity(),
            "network": hashlib.sha256(f"{layers}{shapes}".encode()).hexdigest()[:16],
            "bounds": clf.bounds,
            "mean": clf.mean.flatten().tolist(),
            "std": clf.std.flatten().tolist(),
            "privacy": self.walk.identity(),
        }

    def told(self, identity: dict[str, Any]) -> dict[str, Any]:
        """See `Training`; a digest of the data would answer who guesses one sample and knows all others."""
        return {**identity, "data": str(tuple(self.x.shape))}

    @contextmanager
    def closing(self) -> Iterator[None]:
        """See `Training`; a training that never opens leaves the model as it was, too."""
        try:
            yield
        finally:
            self.walk.close()

    @contextmanager
    def opened(self, folder: Path | None, identity: dict[str, Any]) -> Iterator[None]:
        """See `Training`; the seed is on disk before the first step is booked, so that it can be repeated."""
        try:
            if folder is not None and not self.known:
                self.walk.require_new(folder)
                self.save(folder, identity)
            self.walk.open(folder, identity)
            yield
            if folder is not None and not self.walk.over:
                self.save(folder, self.told(identity), over=True)
        finally:
            self.walk.close()

    def state(self, *, over: bool = False) -> dict[str, Tensor]:
        """See `Training`; without the noise's seed once the training is over."""
        return {**super().state(), **named(_PRIVATE, self.walk.state(over=over))}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """See `Training`."""
        super().restore(tensors)
        self.walk.adopt(below(_PRIVATE, tensors))
        self.known = True

    def advance(self) -> tuple[float, float]:
        """See `Training`; the losses' sum is forgotten."""
        found = super().advance()
        self.place.loss_sum = 0.0
        return found

    def rows(self, epoch: int, number: int) -> Tensor:
        """See `Training`."""
        return self.walk.rows(self.place.step).to(self.x.device)

    def module_seed(self, step: int) -> int:
        """See `Training`; by place in the batch, and so secret: who knew the draws could tell who is in it."""
        return self.walk.seed(step)

    def descend(self, rows: Tensor, epoch_seed: int, step: int) -> float:
        """See `Training`. A sample whose loss is no number adds nothing; weights that are none end the training."""
        recipe, seed = self.recipe.at(step / self.per_epoch), derive(epoch_seed, "step", step)
        parts, total = rows.split(self.part) or (rows,), 0.0
        for number, part in enumerate(parts, 1):
            self.optimizer.zero_grad(set_to_none=True)
            self.walk.begin(last=number == len(parts), rows=len(part))
            if len(part):
                value = self.copies(recipe, part, seed)
                total += float(value.detach()) * len(part) / len(rows)
                value.backward()
            self.walk.end()
        if not finite([p for p in self.module.parameters() if p.requires_grad]):
            raise RunError(
                f"weights are no numbers any more after step {step + 1}; lower the learning rate "
                f"(lr={self.settings.lr:g})"
            )
        return total

    def copies(self, recipe: Recipe, part: Tensor, seed: int) -> Tensor:
        """The mean loss over some samples and over the augmented copies of each."""
        (x, y), count, total = self.samples(part), self.privacy.augmentations, None
        for copy in range(count):
            key = derive(seed, "copy", copy)
            points = x if self.augment is None else self.augment(x, part, key)
            value, memory = recipe.step(self.clf, points, y, part, key, {})
            if memory:
                raise ConfigError(
                    f"{type(recipe).__name__} remembers its last step, which no noise covers; it cannot be private"
                )
            total = value / count if total is None else total + value / count
        assert total is not None
        return total

    def entry(self, epoch: int, rate: float) -> dict[str, float]:
        """See `Training`; without the loss, which is measured on training samples and has no noise."""
        return {"epoch": epoch + 1.0, "lr": rate}

    def probed(self, epoch: int) -> dict[str, float]:
        """Nothing: a probe measures training samples without noise."""
        return {}

    def extras(self) -> dict[str, Any]:
        """See `Training`: what was spent."""
        found = self.walk.summary()
        line = f"stopped after {self.place.step} of {self.steps} steps: the next one would exceed the privacy budget"
        return {"privacy": found, "warnings": [line] if self.place.step < self.steps else []}
