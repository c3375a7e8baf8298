"""A universal perturbation: one change of bounded norm for all images, and the gradient ascent that finds one."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.trial import Trial
from robust.attacks.universal.base import (
    History,
    UniversalAttack,
    batches,
    falling,
    hasten,
    uphill,
    where_allowed,
)
from robust.ball import Bounds, Threat
from robust.errors import DataError, RobustError
from robust.rng import Draws
from robust.threat import make_threat


@dataclass(eq=False)
class Perturbation:
    """One change for all images.

    Attributes:
        delta: (C, H, W) what is added, inside the threat.
        threat: the ball it was found in, of the largest radius if there were several.
        bounds: the model's box, to which perturbed images are cut.
        target: the class it leads to; None if it leads away from the true one, or to one class per sample.
        history: how the search went; see `History`.
        cost: model passes of the search by name.
    """

    delta: Tensor
    threat: Threat
    bounds: Bounds
    target: int | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    cost: dict[str, float] = field(default_factory=dict)

    def apply(self, x: Tensor, threat: Threat | None = None) -> Tensor:
        """Images (N, C, H, W) with the perturbation, inside ball and box; `threat` gives other radii, at most as large.

        In x's dtype, whose rounding is as it is.
        """
        if x.shape[1:] != self.delta.shape:
            raise DataError(
                f"x is {tuple(x.shape)}; this perturbation fits images of {tuple(self.delta.shape)}"
            )
        clean = x.float()
        moved = clean + self.delta.to(clean)
        return (threat or self.threat).project(moved, clean, self.bounds).to(x.dtype)

    def control(self, seed: int = 0) -> Perturbation:
        """Keyed noise as long as the threat allows: what any perturbation of that size does."""
        noise = Draws(seed, "control", torch.zeros(1, dtype=torch.long)).normal(*self.delta.shape)
        return replace(self, delta=self.threat.radius * self.threat.steepest(noise)[0], history=[])

    def points(self, trial: Trial) -> Tensor:
        """See `robust.attacks.universal.base.Change`."""
        return self.apply(trial.x, trial.threat)

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file with what `load` needs."""
        from robust.checkpoint import write_tensors

        facts = {
            "threat": self.threat.describe(),
            "bounds": self.bounds,
            "target": self.target,
            "history": self.history,
            "cost": self.cost,
        }
        write_tensors(Path(path), {"delta": self.delta}, {"format": "pt", "perturbation": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Perturbation:
        """A perturbation that `save` wrote."""
        tensors, facts = read_change(Path(path), "perturbation")
        threat = make_threat(facts["threat"]["norm"], facts["threat"]["eps"])
        low, high = facts["bounds"]
        return cls(tensors["delta"], threat, (low, high), facts["target"], facts["history"], facts["cost"])


def read_change(path: Path, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts of a file that a change's `save` wrote; anything else is one line."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {})[kind])
            return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError, KeyError, ValueError):
        raise RobustError(f"{path} holds no {kind}; name a file that its `save` wrote") from None


@dataclass(frozen=True, kw_only=True)
class PerturbationAttack(UniversalAttack):
    """What universal perturbations of bounded norm have in common: projected gradient ascent over mini-batches.

    A step goes along the steepest direction, in the threat's norm, of the mean loss's gradient with momentum, and back
    into the ball; its size falls to 0 along a half cosine.

    Attributes:
        step_size: of the first step, in the unit of x; None for a quarter of eps.
        momentum: share of the earlier gradients, in [0, 1).
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    step_size: float | None = None
    momentum: float = 0.9

    def learn(self, trial: Trial) -> Perturbation:
        """See `UniversalAttack.learn`."""
        self.check_steps()
        if not 0 <= self.momentum < 1 or (self.step_size is not None and not self.step_size > 0):
            raise RobustError(
                f"momentum={self.momentum}, step_size={self.step_size}: in [0, 1), and positive"
            )
        history = History(self.steps)
        return self.found(trial, self.ascend(trial, history), history)

    def ascend(self, trial: Trial, history: History) -> Tensor:
        """(C, H, W) the perturbation that the gradient leads to."""
        hasten(trial, self.steps * min(self.batch, len(trial.x)))
        largest = trial.threat.with_eps(trial.threat.radius)
        first = largest.radius / 4 if self.step_size is None else self.step_size
        delta = torch.zeros_like(trial.x[:1])
        mean = torch.zeros_like(delta)
        for step, rows in batches(trial, self.batch, self.steps):
            points, free = perturbed(trial, rows, delta)
            answer, hit = uphill(trial, self.loss, rows, points)
            assert answer.gradient is not None
            assert answer.loss is not None
            history.add(step, answer.loss, hit)
            gradient = (answer.gradient * free).mean(0, keepdim=True)
            mean = self.momentum * mean + gradient / gradient.abs().mean().clamp_min(1e-30)
            moved = delta + first * falling(step, self.steps) * largest.steepest(mean)
            delta = within(largest, moved, trial.bounds)
        return delta[0]

    def found(self, trial: Trial, delta: Tensor, history: History) -> Perturbation:
        """The perturbation with what is to be known of it."""
        classes = [] if trial.targets is None else trial.targets.unique().tolist()
        return Perturbation(
            delta.cpu(),
            trial.threat.with_eps(trial.threat.radius),
            trial.bounds,
            classes[0] if len(classes) == 1 else None,
            history.entries,
        )


def perturbed(trial: Trial, rows: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """Some samples under `delta` (1, C, H, W), and where the box and the mask leave it as it is, so that it can act."""
    x = trial.x[rows]
    moved = x + delta
    points = where_allowed(trial, rows, trial.threat.take(rows).project(moved, x, trial.bounds))
    free = (moved >= trial.bounds[0]) & (moved <= trial.bounds[1])
    return points, free if trial.mask is None else free & trial.mask[rows]


def within(threat: Threat, delta: Tensor, bounds: Bounds) -> Tensor:
    """The perturbation's projection on the ball around zero; none is longer than the box is wide."""
    width = bounds[1] - bounds[0]
    return threat.project(delta, torch.zeros_like(delta), (-width, width))
