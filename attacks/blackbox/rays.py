"""RayS: search over sign directions, coarse blocks before fine ones (Chen & Gu 2020, arXiv:2006.06792)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.blackbox.decision import SEEK, DecisionAttack, DecisionRule
from robust.attacks.phases import Heard, Rows
from robust.attacks.rule import Setting, State, choose, column
from robust.errors import RobustError

FLIP, JOIN, SHRINK = 2, 3, 4
_WIDEST_CUT = 0.5  # of the radius that SHRINK takes off at once


class RaySRule(DecisionRule):
    """Algorithms 2 and 3 of the paper, on `far`, the corner of the box that the sign direction points at.

    FLIP turns the signs of the next blocks, each alone, and asks for the points a little nearer than the best radius.
    JOIN turns together all blocks that stayed adversarial alone; if the result is not, only the first is turned.
    SHRINK then looks for the smallest radius along the new direction: cuts that double until one is too deep, then
    bisection. Levels start over, coarse again, after blocks of one coordinate.
    """

    def __init__(self, setting: Setting, queries: int, width: int, precision: float) -> None:
        super().__init__(setting, queries)
        self.width, self.precision = width, precision

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        own = super().start(state)
        self.table = _blocks(state["x"][0].numel()).to(state["x"].device)
        own |= {"position": torch.zeros_like(own["t"]), "join": own["far"].clone()}
        own |= {"radius": torch.ones_like(own["low"]), "cut": torch.ones_like(own["low"])}
        return own

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == SEEK:
            return self._corners(rows)
        if phase == FLIP:
            lanes = torch.arange(self.width, device=rows["x"].device)
            turned = self._turned(rows, self._blocks_at(rows, rows["position"][:, None] + lanes))
            return self._within(rows, turned, self._nearer(rows))
        if phase == JOIN:
            return self._within(rows, rows["join"][:, None], self._nearer(rows))
        if phase == SHRINK:
            return self._within(rows, rows["far"][:, None], self._middle(rows))
        return super().propose(phase, rows)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == FLIP:
            return self._flipped(rows, heard)
        if phase == JOIN:
            return self._shrink(choose(heard.hit[:, 0], rows["join"], rows["far"]), self._nearer(rows))
        if phase == SHRINK:
            return self._shrunk(rows, heard)
        return super().learn(phase, rows, points, heard)

    def landed(self, rows: Rows, at: Tensor) -> State:
        """The first blocks are turned at the radius that the first bisection found."""
        radius = self.setting.threat.distance(at, rows["x"]).float()
        return {"phase": torch.full_like(rows["phase"], FLIP), "radius": radius}

    def _corners(self, rows: Rows) -> Tensor:
        """Where to start from: the given point first, then corners with keyed signs in blocks, ever finer."""
        points, x = self._candidates(rows), rows["x"]
        draws = self.setting.draws({"identity": rows["identity"]}, "rays", rows["t"])
        signs = draws.signs(self.width, x[0].numel())
        order = torch.arange(x[0].numel(), device=x.device)
        for lane in range(self.width):
            size = -(-len(order) >> lane)  # one block, then two, four, …
            sign = signs[:, lane].gather(1, (order // size * size)[None].expand(len(x), -1))
            begun = rows["t"] == 0 if lane == 0 and "begin" in rows else torch.zeros_like(rows["hit"])
            corner = self._box(sign.view_as(x) > 0)
            points[:, lane] = choose(begun, points[:, lane], corner)
        return points

    def _box(self, up: Tensor) -> Tensor:
        low, high = self.setting.bounds
        return torch.where(up, high, low)

    def _within(self, rows: Rows, far: Tensor, radius: Tensor) -> Tensor:
        """(b, k, C, H, W) the corners `far` (b, k, C, H, W) cut to cubes of `radius` (b,) around the clean points."""
        x, reach = rows["x"][:, None], column(radius, far)
        return far.maximum(x - reach).minimum(x + reach)

    def _nearer(self, rows: Rows) -> Tensor:
        """(b,) the radius that a turned block has to do with: less than the best by what is worth its queries."""
        return rows["radius"] * (1 - self.precision)

    def _middle(self, rows: Rows) -> Tensor:
        cut = rows["high"] * (1 - rows["cut"])
        return torch.where(rows["low"] > 0, (rows["low"] + rows["high"]) / 2, cut)

    def _blocks_at(self, rows: Rows, places: Tensor) -> Tensor:
        """(b, k, C, H, W) bool: the blocks at `places` (b, k) of the endless sequence of levels."""
        ends = self.table[places % len(self.table)]
        order = torch.arange(rows["x"][0].numel(), device=places.device)
        inside = (order >= ends[..., :1]) & (order < ends[..., 1:])
        return inside.view(*places.shape, *rows["x"].shape[1:])

    def _turned(self, rows: Rows, where: Tensor) -> Tensor:
        """(b, k, C, H, W) far, with the signs turned `where` (b, k, C, H, W) says."""
        far, x = rows["far"], rows["x"]
        low, high = self.setting.bounds
        down = (far != low) & (
            (far == high) | (far > x)
        )  # a clean value on the edge: far is that edge itself
        return torch.where(where, self._box(~down)[:, None], far[:, None])

    def _flipped(self, rows: Rows, heard: Heard) -> State:
        """No hit: on to the next blocks. One: that block is turned. More: JOIN asks whether they go together."""
        hit, count = heard.hit, heard.hit.sum(1)
        lanes = torch.arange(self.width, device=hit.device)
        blocks = self._blocks_at(rows, rows["position"][:, None] + lanes)
        first = self._turned(rows, blocks[torch.arange(len(hit)), hit.int().argmax(1)][:, None])[:, 0]
        # A coordinate in two of the blocks, a coarse and a fine one, is turned once.
        every = self._turned(rows, (blocks & hit.view(*hit.shape, 1, 1, 1)).any(1, keepdim=True))[:, 0]
        new = self._shrink(choose(count > 0, first, rows["far"]), self._nearer(rows))
        after = torch.where(count > 1, JOIN, SHRINK)
        new["phase"] = torch.where(count > 0, after, FLIP)
        new["radius"] = torch.where(count == 1, new["radius"], rows["radius"])
        return new | {"join": every, "position": rows["position"] + self.width}

    def _shrink(self, far: Tensor, radius: Tensor) -> State:
        """The entries of rows that go on along `far`, known to be adversarial at `radius`."""
        entries = {"far": far, "radius": radius, "high": radius, "low": torch.zeros_like(radius)}
        phase = torch.full_like(radius, SHRINK).long()
        return entries | {"phase": phase, "cut": torch.full_like(radius, 4 * self.precision)}

    def _shrunk(self, rows: Rows, heard: Heard) -> State:
        """Halves what is not known of the radius; once that is small enough, the next blocks follow."""
        middle, hit, asked = self._middle(rows), heard.hit[:, 0], heard.asked[:, 0]
        high = torch.where(hit, middle, rows["high"])
        low = torch.where(asked & ~hit, middle, rows["low"])
        cut = torch.where(hit, (2 * rows["cut"]).clamp_max(_WIDEST_CUT), rows["cut"])
        over = (high - low <= self.precision * high) | (high < 1e-7)
        phase = torch.where(over, FLIP, rows["phase"])
        return {"high": high, "low": low, "cut": cut, "radius": high, "phase": phase}


def _blocks(count: int) -> Tensor:
    """(n, 2) first and last + 1 coordinate of the blocks of all levels: the whole, halves, quarters, … single ones."""
    found, pieces = [], 1
    while True:
        size = -(-count // pieces)
        first = torch.arange(0, count, size)
        found.append(torch.stack([first, (first + size).clamp_max(count)], dim=1))
        if size == 1:
            return torch.cat(found)
        pieces *= 2


@dataclass(frozen=True, kw_only=True)
class RayS(DecisionAttack):
    """RayS (Chen & Gu 2020, arXiv:2006.06792): the smallest linf radius over sign directions, from labels alone.

    Blocks are contiguous in the flattened image. Departures from the paper: `width` blocks are asked about side by
    side, and those that help alone are turned together if that helps too; a block has to beat the best radius by
    `precision`, and the search for the new radius starts there instead of at zero.

    Attributes:
        width: blocks that are asked about in one turn.
        precision: of the radius, as a share of it.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    width: int = 8
    precision: float = 0.003

    def rule(self, setting: Setting) -> RaySRule:
        """See `DecisionAttack.rule`."""
        if self.width < 1 or not 0 < self.precision < 0.1:
            raise RobustError(f"width={self.width}, precision={self.precision}: at least 1, and in (0, 0.1)")
        return RaySRule(setting, self.queries, self.width, self.precision)
