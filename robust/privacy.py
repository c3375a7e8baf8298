"""Differential privacy as an option of a training: what is asked for, and what the loop asks of those who know how.

The machinery (per-sample gradients, noise, accountants, the ledger) lives in `robust.defenses.privacy`, which the core
reaches through its registry. A recipe says itself whether each gradient belongs to one sample (`Recipe.unprivate`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from robust.errors import ConfigError
from robust.parallel import Group
from robust.recipe import Recipe, require

if TYPE_CHECKING:
    from robust.optimise import Settings

CLIPPINGS = ("flat", "per-layer", "automatic", "adaptive")
LEDGER = "privacy.jsonl"


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What a differentially private training shall keep: (epsilon, delta), or a noise whose epsilon is then told.

    Attributes:
        epsilon: the budget. The noise that keeps it over all steps is found; beside a noise it stops the training
            before the first step that would exceed it.
        delta: a probability below one over the number of samples, such as 1e-5; it must be given.
        noise_multiplier: the noise's standard deviation over a sample's largest share of a sum; 0 is no privacy.
        max_grad_norm: the bound on the norm of a sample's gradient.
        clipping: "flat", "per-layer", "automatic" or "adaptive".
        accountant: a name of `robust list accountants`.
        augmentations: copies of a sample, each augmented and drawn for anew, whose mean gradient is clipped once
            (De et al. 2022, arXiv:2204.13650): so many times the work.
        secure_mode: noise and samples from the operating system's cryptographic generator. Such a training goes on
            after a kill, but with other noise, and pays for the steps that it repeats.
    """

    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    max_grad_norm: float = 1.0
    clipping: str = "flat"
    accountant: str = "pld"
    augmentations: int = 1
    secure_mode: bool = False

    def __post_init__(self) -> None:
        epsilon, noise, delta = self.epsilon, self.noise_multiplier, self.delta
        if epsilon is None and noise is None:
            raise ConfigError(
                "private training lacks its measure; give an epsilon to keep, or a noise multiplier"
            )
        if delta is None:
            raise ConfigError(
                "private training lacks its delta; give one below 1 / samples, such as --dp-delta 1e-5"
            )
        require("epsilon", epsilon, epsilon is None or 0 < epsilon < math.inf, "positive and finite")
        require("delta", delta, 0 < delta < 1, "a probability in (0, 1), such as 1e-5")
        require("noise_multiplier", noise, noise is None or 0 <= noise < math.inf, "0 or more, and finite")
        require("max_grad_norm", self.max_grad_norm, 0 < self.max_grad_norm < math.inf, "positive and finite")
        require("clipping", self.clipping, self.clipping in CLIPPINGS, " or ".join(CLIPPINGS))
        require("augmentations", self.augmentations, self.augmentations >= 1, "1 or more")

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        return asdict(self)


class PrivateWalk(Protocol):
    """What `robust.defenses.privacy.walk` does for the loop.

    Attributes:
        per_epoch: steps of an epoch, after which a sample was drawn once on average.
        over: the secret of the noise was dropped, as no further step is to be taken.
    """

    per_epoch: int
    over: bool

    def identity(self) -> dict[str, Any]:
        """What two trainings must share for one to continue the other."""

    def state(self, *, over: bool) -> dict[str, Tensor]:
        """What the next step depends on: with the noise's seed, unless the training is over."""

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes on from what `state` gave."""

    def require_new(self, folder: Path) -> None:
        """Raises one line where the folder has a ledger already, of a training whose checkpoint is gone."""

    def open(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        """Opens the ledger in the folder, if there is one; every step is booked before it is taken."""

    def close(self) -> None:
        """Closes the ledger, and leaves the model as it was before."""

    def fits(self, step: int) -> bool:
        """Whether step number `step` keeps the budget."""

    def rows(self, step: int) -> Tensor:
        """The samples (B,) of a step, a Poisson sample."""

    def seed(self, step: int) -> int:
        """A secret seed for what a model draws itself, such as dropout."""

    def begin(self, *, last: bool, rows: int) -> None:
        """Says that a part of the batch comes, whether it is the last one, and how many samples it has."""

    def end(self) -> None:
        """After the part's backward pass; the last one's books the step and takes it."""

    def summary(self) -> dict[str, Any]:
        """What was spent, by which accountant, under which assumptions."""


def refuse(recipe: Recipe, settings: Settings, group: Group, count: int) -> None:
    """Raises one line where a training cannot be private, whatever the model.

    Args:
        count: training samples.

    Raises:
        ConfigError: the recipe, an option of the walk, or several processes stand against it.
    """
    chosen = {name: getattr(recipe, name) for name in getattr(recipe, "__dataclass_fields__", {})}
    name, reason = type(recipe).__name__, recipe.unprivate(**chosen)
    if not reason and recipe.repeats > 1:
        reason = "it takes several steps on the same batch, each of which would have to be paid for"
    if reason:
        raise ConfigError(f"{name} cannot be trained with differential privacy: {reason}")
    if settings.compiled:
        raise ConfigError(
            "compiled=true cannot be trained with differential privacy: layers that keep samples apart run one by "
            "one; leave it out"
        )
    if group.size > 1:
        raise ConfigError(
            f"{group.size} processes cannot share a differentially private training, whose samples are drawn in one; "
            "train in one process"
        )
    if settings.batch_size > count:
        raise ConfigError(
            f"batch_size={settings.batch_size} cannot be the expected size of a Poisson sample of {count}; "
            f"it must be at most {count}"
        )


def finite(parameters: list[torch.nn.Parameter]) -> bool:
    """Whether all weights are numbers."""
    return all(bool(parameter.isfinite().all()) for parameter in parameters)
