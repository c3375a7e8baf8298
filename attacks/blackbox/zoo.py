"""ZOO: coordinate-wise difference quotients and Adam (Chen et al. 2017, arXiv:1708.03999)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Until
from robust.attacks.blackbox.score import CHECK, PROBE, ScoreAttack, ScoreRule
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import Setting, State
from robust.errors import RobustError

_FIRST, _SECOND, _TINY = 0.9, 0.999, 1e-8  # Adam's decays and its ε
_RATE = 0.01
_FACTOR, _LEAST = 2.0, 1.1  # first and least change of c
_MOST = 32  # coordinates of a row in one turn: more would fill the memory with large images


class ZOORule(ScoreRule):
    """Algorithm 2 of the paper on ‖δ‖² + c · max(κ − margin, 0), with Adam's moments kept for each coordinate.

    PROBE asks x ± h along random coordinates, and moves them; the distance's own slope is known. CHECK asks about the
    point after `batch` coordinates. Where the paper searches c in runs that begin anew, which its budget of a million
    queries allows, here c follows each check: it falls while the point is adversarial and rises while it is not.
    """

    def __init__(self, setting: Setting, queries: int, shape: tuple[int, ...], attack: ZOO) -> None:
        super().__init__(setting, queries)
        self.attack, self.count = attack, math.prod(shape)
        batch = max(1, min(attack.batch, self.count, queries // 20))
        self.turns = -(-batch // _MOST)
        self.coordinates = -(-batch // self.turns)
        self.width = 2 * self.coordinates

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        own |= {"at": x.clone(), "mean": torch.zeros_like(x), "square": torch.zeros_like(x)}
        own |= {"moves": torch.zeros_like(x), "weight": x.new_full((len(x),), self.attack.weight)}
        own |= {"turn": torch.zeros_like(own["t"]), "factor": x.new_full((len(x),), _FACTOR)}
        own |= {"rate": self._rate(state)}
        own |= {"won": torch.zeros_like(state["hit"])}
        return own | {"phase": torch.full_like(own["t"], PROBE if self.steps > self.width else CHECK)}

    def _rate(self, state: State) -> Tensor:
        """(B,) Adam's rate: at least such that the whole budget's steps in one direction could leave the ball."""
        x, (low, high) = state["x"], self.setting.bounds
        if self.attack.rate is not None:
            return x.new_full((len(x),), self.attack.rate)
        reach = self.setting.eps(state).flatten().clamp_max((high - low) / 4)
        return (4 * reach * math.sqrt(self.count) / self.steps).clamp_min(_RATE)

    def _picked(self, rows: Rows) -> Tensor:
        """(b, coordinates) one random coordinate out of each of as many runs of equal length."""
        places = torch.arange(self.coordinates, device=rows["x"].device)
        where = self.draws(rows, "zoo").uniform(self.coordinates).double().to(places.device) + places
        return (where * (self.count / self.coordinates)).long().clamp_max(self.count - 1)

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == CHECK:
            return rows["at"][:, None]
        at = rows["at"].flatten(1)[:, None].expand(-1, self.coordinates, -1)
        move = torch.zeros_like(at).scatter(2, self._picked(rows)[:, :, None], self.attack.sigma)
        return torch.cat((at + move, at - move), 1).view(len(at), -1, *rows["x"].shape[1:])

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        assert heard.loss is not None
        if phase == CHECK:
            return self._checked(rows, heard)
        picked = self._picked(rows)
        lost = (self.attack.confidence - heard.loss.nan_to_num(0.0)).clamp_min(0).chunk(2, 1)
        plus, minus = (side.flatten(2).gather(2, picked[:, :, None])[..., 0] for side in points.chunk(2, 1))
        slope = (lost[0] - lost[1]) / (plus - minus).clamp_min(1e-12)
        turn = rows["turn"] + 1
        over = (turn >= self.turns) | (self.left(rows) <= self.width)
        new = self._moved(rows, picked, slope)
        new |= {"turn": torch.where(over, 0, turn), "phase": torch.where(over, CHECK, PROBE)}
        return new

    def _moved(self, rows: Rows, picked: Tensor, slope: Tensor) -> State:
        """A step of Adam on the picked coordinates alone."""
        names = ("x", "at", "mean", "square", "moves")
        x, at, mean, square, moves = (rows[name].flatten(1).gather(1, picked) for name in names)
        slope = 2 * (at - x) + rows["weight"][:, None] * slope
        moves = moves + 1
        mean = _FIRST * mean + (1 - _FIRST) * slope
        square = _SECOND * square + (1 - _SECOND) * slope.square()
        spread = (square / (1 - _SECOND**moves)).sqrt() + _TINY
        at = at - rows["rate"][:, None] * mean / (1 - _FIRST**moves) / spread
        changed = zip(names[1:], (at, mean, square, moves), strict=True)
        new = {
            name: rows[name].flatten(1).scatter(1, picked, value).view_as(rows[name])
            for name, value in changed
        }
        return new | {"at": self.ball(rows).project(new["at"], rows["x"], self.setting.bounds)}

    def _checked(self, rows: Rows, heard: Heard) -> State:
        """Weighs the margin less where the point is adversarial, else more, by smaller factors at each turn."""
        hit = heard.hit[:, 0]
        turned = hit != rows["won"]
        factor = torch.where(turned, rows["factor"].sqrt().clamp_min(_LEAST), rows["factor"])
        weight = rows["weight"] * torch.where(hit, 1 / factor, factor)
        more = self.left(rows) > self.width
        return {
            "won": hit,
            "factor": factor,
            "weight": weight.clamp(1e-6, 1e10),
            "phase": torch.where(more, PROBE, self.DONE),
        }


@dataclass(frozen=True, kw_only=True)
class ZOO(ScoreAttack):
    """ZOO (Chen et al. 2017, arXiv:1708.03999): the C&W objective by coordinate-wise difference quotients, minimum l2.

    Of the paper's forms this is ZOO-Adam in the image's own space, without the hierarchy for large images.

    Attributes:
        batch: coordinates moved between two looks at the point; at most a 20th of `queries`.
        sigma: h of the difference quotients; the paper's 1e-4 is lost in a float32 model's rounding.
        rate: Adam's learning rate, in the unit of x; None for 0.01, or more where so few `queries` would not come far
            with it: 4 min(eps, a quarter of the box's width) √d / queries.
        weight: c that the margin has at first.
        confidence: margin κ that is wished for.
    """

    norms: ClassVar[tuple[str, ...]] = ("l2",)
    minimum_norm: ClassVar[bool] = True
    until: Until = "smallest"
    batch: int = 128
    sigma: float = 1e-3
    rate: float | None = None
    weight: float = 1.0
    confidence: float = 0.0

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `ScoreAttack.rule`."""
        self.positive("batch", "sigma", "rate", "weight")
        if self.confidence < 0:
            raise RobustError(f"confidence={self.confidence} must not be negative")
        return ZOORule(setting, self.queries, shape, self)
