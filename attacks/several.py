"""Several points of a row in one query: which are asked, their answers in place, and the best of each row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robust.attacks.query import Answer, Query, join
from robust.attacks.rule import State
from robust.attacks.trial import Trial

_PER_ROW = ("y", "target", "reference")


def spread(value: Tensor, each: int) -> Tensor:
    """Rows (B, …) as the rows of their points (B · each, …)."""
    return value.repeat_interleave(each, 0) if each > 1 else value


@dataclass(frozen=True)
class Points:
    """The points of one query beside the rows that they belong to.

    Attributes:
        each: points of a row.
        asked: (B · each,) bool, or None where all are.
    """

    each: int
    asked: Tensor | None

    @property
    def plain(self) -> bool:
        """One point of every row, as most rules ask."""
        return self.each == 1 and self.asked is None

    def counts(self, rows: int) -> Tensor | int:
        """(B,) points asked of each row, or the one number of all."""
        return self.each if self.asked is None else self.asked.view(rows, self.each).sum(1)


def within_budget(query: Query, state: State, budget: int | None) -> Points:
    """Which points are asked: those the rule wants, as far as each row's budget goes."""
    rows = len(state["row"])
    each, asked = len(query.x) // rows, query.asked
    if budget is not None:
        wanted = torch.ones(len(query.x), dtype=torch.bool, device=query.x.device) if asked is None else asked
        table = wanted.view(rows, each)
        asked = (table & (state["spent"][:, None] + table.cumsum(1) <= budget)).flatten()
        asked = None if bool(asked.all()) else asked
    return Points(each, asked)


def answer_several(
    trial: Trial, query: Query, points: Points, state: State, active: Tensor, size: int
) -> Answer:
    """The answers to the points that are asked, in their places, at most `size` points at a time; the others are 0."""
    total = len(query.x)
    chosen = (
        torch.arange(total, device=query.x.device) if points.asked is None else points.asked.nonzero()[:, 0]
    )
    owner = torch.div(chosen, points.each, rounding_mode="floor")
    busy, parts = active.to(owner.device)[owner].cpu(), []
    for place, row, counted in zip(chosen.split(size), owner.split(size), busy.split(size), strict=True):
        against = None if query.against is None else query.against[row]
        part = replace(query, x=query.x[place], against=against, asked=None)
        parts.append(
            trial.answer(part, {name: state[name][row] for name in _PER_ROW if name in state}, counted)
        )
    if not parts:
        return Answer(query.x.new_zeros(total, trial.classes), query.x.new_zeros(total))
    found = join(parts)
    loss = None if found.loss is None else _placed(found.loss, chosen, total)
    gradient = None if found.gradient is None else _placed(found.gradient, chosen, total)
    return Answer(_placed(found.scores, chosen, total), loss, gradient)


def _placed(value: Tensor, chosen: Tensor, total: int) -> Tensor:
    if len(chosen) == total:
        return value
    whole = value.new_zeros(total, *value.shape[1:])
    whole[chosen] = value
    return whole


def best_of(rank: Tensor, score: Tensor, each: int) -> Tensor:
    """(B,) the place of each row's best point among its `each`: by rank, then by score, the first of equals."""
    rank, score = rank.view(-1, each), score.view(-1, each).nan_to_num(-torch.inf, torch.inf, -torch.inf)
    among = torch.where(rank == rank.amax(1, keepdim=True), score, -torch.inf)
    first = (among == among.amax(1, keepdim=True)) & (rank == rank.amax(1, keepdim=True))
    return first.int().argmax(1) + torch.arange(len(rank), device=rank.device) * each
