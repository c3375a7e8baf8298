"""Rules whose rows are in different phases of a method, and that ask several points of a row at once.

A subclass writes each phase as if all rows were in it; which rows are, and how many points they ask, is settled here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State
from robust.classifier import misclassified
from robust.losses import Loss


class Rows(Mapping[str, Tensor]):
    """Some rows of a state, each tensor taken when it is asked for."""

    def __init__(self, state: State, rows: Tensor) -> None:
        self._state, self.rows = state, rows
        self._taken: State = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._taken:
            self._taken[name] = self._state[name][self.rows]
        return self._taken[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __contains__(self, name: object) -> bool:
        return name in self._state


@dataclass(frozen=True)
class Heard:
    """What the subject said about the points that a phase's b rows asked, k each.

    Attributes:
        asked: (b, k) bool: the budget may have cut some off; what stands for those below means nothing.
        hit: (b, k) bool: asked and adversarial: misclassified, or as the target.
        scores: (b, k, K); loss: (b, k), of a rule that has one.
    """

    asked: Tensor
    hit: Tensor
    scores: Tensor
    loss: Tensor | None


class PhasedRule(Rule):
    """A black-box method in phases: `propose` the points of a phase, `learn` from the answers.

    Attributes:
        width: the most points that a row asks in a turn.
        want: what the method needs to know: "labels" or "logits".
    """

    feasible = False
    passes = 1
    width: int = 1
    want: ClassVar[Literal["labels", "logits"]] = "labels"
    DONE: ClassVar[int] = 99

    def __init__(self, setting: Setting, queries: int, loss: Loss | None = None) -> None:
        super().__init__(setting)
        self.budget: int = queries
        self.steps, self.loss = queries, loss
        self._before = torch.zeros(0)
        self._under_way: list[tuple[int, Tensor, Tensor]] = []

    def start(self, state: State) -> State:
        """Every row in phase 0."""
        own = super().start(state)
        own["phase"] = torch.zeros_like(own["t"])
        return own

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """(b, k, C, H, W) what rows in this phase ask now, k at most `width`; it is cut to the box."""
        raise TypeError(f"{type(self).__name__} proposes nothing in phase {phase}")

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """What changes in the rows, `phase` among it, after the answers to `points` (b, k, C, H, W)."""
        raise TypeError(f"{type(self).__name__} learns nothing in phase {phase}")

    def query(self, state: State) -> Query:
        """The points of every row, by its phase."""
        x = state["x"]
        points = x[:, None].repeat_interleave(self.width, 1)
        asked = torch.zeros(len(x), self.width, dtype=torch.bool, device=x.device)
        self._before, self._under_way = state["spent"], []
        for phase in state["phase"].unique().tolist():
            if phase == self.DONE:
                continue
            rows = (state["phase"] == phase).nonzero()[:, 0]
            proposed = self.propose(phase, Rows(state, rows)).clamp(*self.setting.bounds)
            count = proposed.shape[1]
            points[rows, :count], asked[rows, :count] = proposed, True
            self._under_way.append((phase, rows, proposed))
        return Query(points.flatten(0, 1), self.want, loss=self.loss, asked=asked.flatten())

    def step(self, state: State, answer: Answer) -> State:
        """The rows' changes, phase by phase."""
        new: State = {"t": state["t"] + 1}
        aimed = state["target"] if self.setting.targeted else None
        shape = (len(state["x"]), self.width)
        y = state["y"].repeat_interleave(self.width)
        hits = misclassified(
            answer.scores, y, None if aimed is None else aimed.repeat_interleave(self.width)
        ).view(shape)
        scores = answer.scores.view(*shape, -1)
        losses = None if answer.loss is None else answer.loss.view(shape)
        for phase, rows, points in self._under_way:
            count = points.shape[1]
            places = torch.arange(1, count + 1, device=rows.device)[None]
            asked = self._before[rows, None] + places <= self.budget
            heard = Heard(
                asked,
                hits[rows, :count] & asked,
                scores[rows, :count],
                None if losses is None else losses[rows, :count],
            )
            for name, value in self.learn(phase, Rows(state, rows), points, heard).items():
                if name not in new:
                    new[name] = state[name].clone()
                new[name][rows] = value.to(new[name].dtype)
        return new

    def done(self, state: State) -> Tensor:
        """Rows whose budget is spent, or whose method has ended."""
        return (state["phase"] == self.DONE) | (state["spent"] >= self.steps)
