"""SimBA: one direction of an orthonormal basis after the other (Guo et al. 2019, arXiv:1905.07121)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from robust.attacks.blackbox.score import ScoreAttack, ScoreRule, step_sizes
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import Setting, State, choose, column
from robust.errors import RobustError

Basis = Literal["pixel", "dct"]
PLUS, MINUS = 0, 1
_STEP = {"linf": 1.0, "l2": 0.2}  # of eps


@lru_cache(maxsize=8)
def cosines(length: int) -> Tensor:
    """(length, length) the orthonormal DCT-II: row k is its k-th wave."""
    place = torch.arange(length, dtype=torch.float64)
    waves = torch.cos(math.pi / length * (place[None] + 0.5) * place[:, None]) * math.sqrt(2 / length)
    waves[0] /= math.sqrt(2)
    return waves.float()


class SimBARule(ScoreRule):
    """Algorithm 1 of the paper: a step along a direction, else against it, is kept where the margin rises.

    Directions come in a keyed random order, and in another one when all have been tried. A step that leads out of the
    ball is projected back on it, so that the search goes on where the paper's ends.
    """

    needs_reference = True

    def __init__(self, setting: Setting, queries: int, shape: tuple[int, ...], attack: SimBA) -> None:
        super().__init__(setting, queries)
        self.step_size = attack.step_size
        waves = [torch.eye(side) for side in shape[1:]]
        if attack.basis == "dct":
            waves = [cosines(side)[: max(math.ceil(side * attack.share), 1)] for side in shape[1:]]
        self.down, self.across = waves
        self.channels, self.count = shape[0], shape[0] * len(self.down) * len(self.across)

    def start(self, state: State) -> State:
        """See `PhasedRule.start`; what the model says about the clean point is known."""
        own = super().start(state)
        assert self.loss is not None
        own |= {"at": state["x"].clone(), "tried": torch.zeros_like(own["t"])}
        own["value"] = self.loss(state["reference"], state["y"], state.get("target"))
        own["size"] = step_sizes(self, state, self.step_size, _STEP[self.setting.threat.norm])
        return own | {"order": self._order(state, own["tried"])}

    def _order(self, state: Mapping[str, Tensor], round_: Tensor) -> Tensor:
        """(b, directions) a keyed permutation for each round."""
        draws = self.setting.draws({"identity": state["identity"]}, "simba", round_)
        return draws.bits(self.count).argsort(dim=1, stable=True)

    def _move(self, rows: Rows) -> Tensor:
        """(b, C, H, W) the step along each row's present direction, its length measured in the threat's norm."""
        picked = rows["order"].gather(1, (rows["tried"] % self.count)[:, None])[:, 0]
        self.down, self.across = self.down.to(rows["x"]), self.across.to(rows["x"])
        place, column_ = picked // len(self.across), picked % len(self.across)
        wave = self.down[place % len(self.down)][:, :, None] * self.across[column_][:, None]
        channel = torch.nn.functional.one_hot(place // len(self.down), self.channels).to(wave)
        move = channel[:, :, None, None] * wave[:, None]
        length = self.setting.threat.length(move).to(move)
        return move * column(rows["size"] / length, move)

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        sign = 1 if phase == PLUS else -1
        moved = rows["at"] + sign * self._move(rows)
        return self.ball(rows).project(moved, rows["x"], self.setting.bounds)[:, None]

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        assert heard.loss is not None
        loss = heard.loss[:, 0]
        better = loss > rows["value"]
        over = better | (phase == MINUS)
        tried = rows["tried"] + over
        new: State = {
            "at": choose(better, points[:, 0], rows["at"]),
            "value": torch.where(better, loss, rows["value"]),
            "tried": tried,
            "phase": torch.where(over, PLUS, MINUS),
        }
        again = over & (tried % self.count == 0)
        if bool(again.any()):
            new["order"] = choose(again, self._order(rows, tried // self.count), rows["order"])
        return new


@dataclass(frozen=True, kw_only=True)
class SimBA(ScoreAttack):
    """SimBA (Guo et al. 2019, arXiv:1905.07121): steps along the directions of an orthonormal basis, one at a time.

    Attributes:
        basis: "pixel": single coordinates; "dct": waves of the discrete cosine transform.
        share: part of each side's frequencies, the lowest, that "dct" uses, in (0, 1]; the paper's 1/8 is for ImageNet.
        step_size: length of a step in the threat's norm; None for 0.2 · eps in l2, and eps in linf, which the paper
            does not have. The paper's 0.2 was for l2 changes of about 4.
    """

    basis: Basis = "dct"
    share: float = 1.0
    step_size: float | None = None

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `ScoreAttack.rule`."""
        if self.basis not in get_args(Basis):
            raise RobustError(f"basis={self.basis!r} is unknown; use one of {', '.join(get_args(Basis))}")
        self.positive("step_size")
        if not 0 < self.share <= 1:
            raise RobustError(f"share={self.share} must be in (0, 1]")
        return SimBARule(setting, self.queries, shape, self)
