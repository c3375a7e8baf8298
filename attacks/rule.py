"""A rule is an attack's algorithm on row-indexed state; the engine is its loop."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.query import Answer, Query
from robust.losses import Loss
from robust.rng import Draws
from robust.threat import Bounds, Threat

State = dict[str, Tensor]


@dataclass(frozen=True)
class Jobs:
    """Work for the engine, first come first served.

    Attributes:
        row: (J,) positions of samples in the trial.
        target: (J,) class that the job aims its loss at, -1 for none.
        number: (J,) which restart or target of its sample this is: keys its randomness.
    """

    row: Tensor
    target: Tensor
    number: Tensor

    def take(self, picked: Tensor) -> Jobs:
        """Some of the jobs, in the order of `picked`."""
        return Jobs(self.row[picked], self.target[picked], self.number[picked])


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    threat: Threat
    bounds: Bounds
    seed: int
    classes: int
    targeted: bool = False

    def ball(self, state: State) -> Threat:
        """The threat of the state's rows, when eps is one per sample."""
        return self.threat.with_eps(state["eps"]) if "eps" in state else self.threat

    def eps(self, state: State) -> Tensor:
        """(B, 1, 1, 1) radii of the state's rows."""
        x = state["x"]
        value = torch.as_tensor(self.ball(state).eps, dtype=x.dtype, device=x.device)
        return value.expand(len(x)).view(-1, *[1] * (x.dim() - 1))

    def draws(self, state: State, stream: str, step: Tensor | int = 0) -> Draws:
        """Keyed randomness of the state's rows."""
        return Draws(self.seed, stream, state["identity"], step)


class Rule:
    """One algorithm. State is a dict of tensors whose first dimension is the row.

    The engine fills in `x`, `y`, `identity`, `spent` (points asked so far), `target` where jobs aim, `eps` where it is
    one per sample, `mask` and `begin` where they were given, `reference` where the rule needs it; it keeps a row's best
    point in `best`, `hit`, `sure`, `score` and `first`, and its sample in `row`. A rule adds entries of other names in
    `start` and reads its own step counter `t`, so that rows may be at different steps.

    Attributes:
        feasible: whether every point it queries lies inside the threat.
        steps: steps of one job, for progress.
        loss: what it maximises, where it maximises one.
        needs_reference: whether its loss compares with the clean points' logits.
        passes: model passes of a step, about: a gradient counts as three.
        looks_last: whether the last query only looks at the point that the last step led to, `at`.
        steady: whether every row's `t` grows by one with every step.
        clock: (B,) on the CPU: a steady rule's `t`, without asking the device for it; None where there is none.
        budget: the most points that a job may ask; the engine sees to it. None where `steps` says it all.
        scouted: whether a twin in bfloat16 may run it first: it climbs a loss, and small errors do not mislead it.
    """

    feasible = True
    scouted = False
    budget: int | None = None
    steps = 1
    passes = 3
    steady = False
    looks_last = False
    clock: Tensor | None = None
    loss: Loss | None = None
    needs_reference = False

    def __init__(self, setting: Setting) -> None:
        self.setting = setting

    def start(self, state: State) -> State:
        """The rule's own entries for new rows; `state` holds the engine's."""
        return {"t": torch.zeros(len(state["x"]), dtype=torch.long, device=state["x"].device)}

    def query(self, state: State) -> Query:
        """What to ask about the rows now."""
        raise TypeError(f"{type(self).__name__} asks nothing")

    def step(self, state: State, answer: Answer) -> State:
        """Entries that change with the answer."""
        raise TypeError(f"{type(self).__name__} takes no step")

    def ending(self, state: State) -> bool:
        """Whether every row has only its last point to check; False where only a GPU could tell."""
        clock = state["t"] if self.clock is None else self.clock
        return clock.device.type == "cpu" and bool((clock >= self.steps - 1).all())

    def done(self, state: State) -> Tensor:
        """(B,) bool: rows that are finished."""
        return state["t"] >= self.steps


def column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …, 1) beside `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def choose(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Row-wise choice between two tensors by a (B,) mask."""
    return torch.where(column(mask, yes), yes, no)
