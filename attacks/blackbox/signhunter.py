"""SignHunter: the gradient's signs by divide and conquer (Al-Dujaili & O'Reilly 2020, arXiv:1902.06894)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.blackbox.score import ScoreAttack, ScoreRule
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import Setting, State, choose, column


def halvings(count: int, most: int) -> Tensor:
    """(S, 2) first and last + 1 of the runs to flip: all `count`, its halves, quarters, …; the first `most` at most."""
    runs: list[tuple[int, int]] = []
    for level in range(math.ceil(math.log2(max(count, 1))) + 1):
        length = math.ceil(count / 2**level)
        runs += [(first, min(first + length, count)) for first in range(0, count, length)]
        if len(runs) >= most:
            break
    return torch.tensor(runs[:most])


class SignHunterRule(ScoreRule):
    """Algorithms 1 and 2 of the paper: the signs of ever shorter runs are flipped, and stay so where the margin rises.

    The point asked is x + eps · signs, scaled to the ball. When single coordinates have been flipped it starts again
    with all of them.
    """

    def __init__(self, setting: Setting, queries: int, shape: tuple[int, ...]) -> None:
        super().__init__(setting, queries)
        self.count = math.prod(shape)
        self.runs = halvings(self.count, queries)

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        whole = self.setting.ball(state).length(torch.ones_like(x)).to(x)
        own |= {"signs": torch.ones_like(x), "size": self.setting.eps(state).flatten() / whole}
        return own | {"value": torch.full((len(x),), -torch.inf, device=x.device)}

    def _flipped(self, rows: Rows) -> Tensor:
        """(b, C, H, W) signs with the present run turned; the first turn asks them as they are."""
        self.runs = self.runs.to(rows["t"].device)
        run = self.runs[(rows["t"] - 1).clamp_min(0) % len(self.runs)]
        place = torch.arange(self.count, device=run.device)[None]
        turned = (place >= run[:, :1]) & (place < run[:, 1:]) & (rows["t"] > 0)[:, None]
        return torch.where(turned.view_as(rows["signs"]), -rows["signs"], rows["signs"])

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        signs = self._flipped(rows)
        moved = rows["x"] + column(rows["size"], signs) * signs
        return self.ball(rows).project(moved, rows["x"], self.setting.bounds)[:, None]

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        assert heard.loss is not None
        loss = heard.loss[:, 0]
        better = loss > rows["value"]
        return {
            "signs": choose(better, self._flipped(rows), rows["signs"]),
            "value": torch.where(better, loss, rows["value"]),
        }


@dataclass(frozen=True, kw_only=True)
class SignHunter(ScoreAttack):
    """SignHunter (Al-Dujaili & O'Reilly 2020, arXiv:1902.06894): divide-and-conquer flips of the gradient's signs.

    It has no parameters but its budget.
    """

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `ScoreAttack.rule`."""
        return SignHunterRule(setting, self.queries, shape)
