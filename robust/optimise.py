"""How a training walks: its settings, optimizers, learning-rate schedules and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust.errors import ConfigError
from robust.registry import unknown

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "linear", "piecewise"]
_OPTIMIZERS = ("sgd", "adam", "adamw")
_SCHEDULES = ("constant", "cosine", "linear", "piecewise")


@dataclass(frozen=True)
class Settings:
    """What one training loop needs to know besides model, data and loss.

    Attributes:
        epochs: passes over the data.
        batch_size: samples in one step.
        lr: peak learning rate.
        optimizer: "sgd" (Nesterov), "adam" or "adamw".
        momentum: of "sgd"; Adam has its usual (0.9, 0.999).
        weight_decay: coupled for "sgd" and "adam", decoupled for "adamw".
        schedule: "constant"; "cosine" and "linear" fall to zero; "piecewise" falls by `gamma` at each milestone.
        warmup: epochs in which the learning rate first rises linearly to `lr`.
        cycles: how often the schedule runs, each time in an equal part of the epochs after the warm-up (warm restarts,
            Loshchilov & Hutter 2017, arXiv:1608.03983).
        milestones: fractions of a cycle, for "piecewise".
        gamma: factor at a milestone.
        ema: decay of the averaged weights that the model ends with, for example 0.995; None for no average.
        seed: keys the shuffling, the augmentation, dropout and the recipe's own randomness.
        channels_last: whether to train in the channels-last memory format, which is faster for convolutions.
        precision: "bfloat16": forwards under autocast, inner attacks on a bfloat16 twin; weights stay in float32.
        compiled: whether forwards and backwards are compiled: a minute or two at the start, then a fifth faster.
        accumulate: equal parts that a batch is taken in, one after another, for less memory; gradients add up.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 1e-3
    optimizer: Optimizer = "adam"
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    warmup: float = 0.0
    cycles: int = 1
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    ema: float | None = None
    seed: int = 0
    channels_last: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    compiled: bool = False
    accumulate: int = 1

    def __post_init__(self) -> None:
        _require("epochs", self.epochs, self.epochs >= 1, "1 or more")
        _require("batch_size", self.batch_size, self.batch_size >= 1, "1 or more")
        _require("lr", self.lr, 0 < self.lr < math.inf, "a positive number")
        _require("optimizer", self.optimizer, self.optimizer in _OPTIMIZERS, " or ".join(_OPTIMIZERS))
        _require("schedule", self.schedule, self.schedule in _SCHEDULES, " or ".join(_SCHEDULES))
        _require("momentum", self.momentum, 0 <= self.momentum < 1, "in [0, 1)")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        _require("warmup", self.warmup, 0 <= self.warmup < math.inf, "0 epochs or more")
        _require("cycles", self.cycles, 1 <= self.cycles <= self.epochs, "1 to the number of epochs")
        _require(
            "milestones", self.milestones, all(0 < m < 1 for m in self.milestones), "fractions in (0, 1)"
        )
        _require("gamma", self.gamma, 0 < self.gamma <= 1, "in (0, 1]")
        _require(
            "precision", self.precision, self.precision in ("float32", "bfloat16"), "float32 or bfloat16"
        )
        _require(
            "accumulate", self.accumulate, 1 <= self.accumulate <= self.batch_size, "1 to the batch size"
        )
        _require("ema", self.ema, self.ema is None or 0 < self.ema < 1, "in (0, 1), or none")

    def learning_rate(self, step: int, per_epoch: float) -> float:
        """The learning rate of step number `step` (from 0), with `per_epoch` steps in an epoch."""
        rising = self.warmup * per_epoch
        if step < rising:
            return self.lr * (step + 1) / (rising + 1)
        period = max((self.epochs * per_epoch - rising) / self.cycles, 1)
        done = (step - rising) % period / period
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * done))
        if self.schedule == "linear":
            return self.lr * (1 - done)
        if self.schedule == "piecewise":
            return self.lr * self.gamma ** sum(done >= m for m in self.milestones)
        return self.lr


def make_settings(walk: Mapping[str, Any]) -> Settings:
    """The settings that fields by name make.

    Raises:
        ConfigError: a field is unknown, `epochs` is missing, or a value makes no sense.
    """
    known = [item.name for item in fields(Settings)]
    for name in walk:
        if name not in known:
            raise ConfigError(unknown("setting", name, known))
    if "epochs" not in walk:
        raise ConfigError(
            "epochs is missing: say how many passes over the data to take, for example epochs=10"
        )
    return Settings(**{**walk, "milestones": tuple(walk.get("milestones", Settings.milestones))})


def _require(name: str, value: object, good: bool, right: str) -> None:
    if not good:
        raise ConfigError(f"{name}={value} cannot be trained with; it must be {right}")


def make_optimizer(settings: Settings, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `settings` over the parameters of `module` that are not frozen."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ConfigError("this model has no parameter that requires a gradient; there is nothing to train")
    lr, decay = settings.lr, settings.weight_decay
    if settings.optimizer == "sgd":
        momentum = settings.momentum
        return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=decay, nesterov=momentum > 0)
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr, weight_decay=decay)


class Average:
    """Exponential moving average of a module's state, parameters and floating buffers alike.

    The decay of step t is ``min(decay, (1 + t) / (10 + t))``, so that a short training is not dominated by its start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take the module's state after its step number `step` (from 0) into the average."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, weight)
            else:
                self.state[name].copy_(value)

    def load(self, state: dict[str, Tensor]) -> None:
        """Continue from the average `state`."""
        for name, value in self.state.items():
            value.copy_(state[name])

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """The module holds the averaged state inside, and its own again afterwards."""
        own = {name: value.detach().clone() for name, value in module.state_dict().items()}
        module.load_state_dict(self.state)
        try:
            yield
        finally:
            module.load_state_dict(own)


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as named tensors, ``"<parameter>.<key>"``."""
    state = optimizer.state_dict()["state"]
    return {
        f"{i}.{key}": value
        for i, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, Tensor)
    }


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `state_tensors` gave."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
