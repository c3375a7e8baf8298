"""SurFree: random planes through the clean point, without gradient estimates (Maho et al. 2021, arXiv:2011.12807)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.blackbox.decision import DecisionAttack, DecisionRule
from robust.attacks.blackbox.frequencies import smooth_noise
from robust.attacks.phases import Heard, Rows
from robust.attacks.rule import Setting, State, choose, column
from robust.errors import RobustError

PLANES, TURN = 2, 3
_TIMES = (0.5, 1.0, 1.5, 2.0, 2.8, 4.0)  # angles that are asked about side by side, in units of the row's own
_LESS = 0.7  # of the angle, where it was too large


class SurFreeRule(DecisionRule):
    """Algorithm 1 of the paper, with several planes side by side.

    With u the direction of the boundary point at distance d, the plane of u and v ⟂ u holds the circle of points at
    distance d cos α in the direction u cos α + v sin α. PLANES asks for ±α in planes of orthogonal smooth v. TURN
    searches the largest adversarial α along the sum of those v that had one.
    """

    def __init__(self, setting: Setting, queries: int, planes: int, angle: float, share: float) -> None:
        super().__init__(setting, queries)
        self.planes, self.angle, self.share = planes, angle, share
        self.width = max(2 * planes, len(_TIMES))

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        own = super().start(state)
        angle = torch.full_like(own["low"], math.radians(self.angle))
        return own | {"angle": angle, "lane": torch.zeros_like(state["x"])}

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == PLANES:
            frame = self._frame(rows)
            angle = rows["angle"][:, None].expand(-1, self.planes)
            return self._circle(rows, torch.cat([frame, frame], 1), torch.cat([angle, -angle], 1))
        if phase == TURN:
            angles = rows["angle"][:, None] * torch.tensor(_TIMES, device=rows["x"].device)
            lanes = rows["lane"][:, None].expand(-1, len(_TIMES), -1, -1, -1)
            return self._circle(rows, lanes, angles.clamp_max(1.5))
        return super().propose(phase, rows)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == PLANES:
            return self._looked(rows, points, heard)
        if phase == TURN:
            return self._turned(rows, points, heard)
        return super().learn(phase, rows, points, heard)

    def landed(self, rows: Rows, at: Tensor) -> State:
        """The first planes."""
        return {"phase": torch.full_like(rows["phase"], PLANES)}

    def _frame(self, rows: Rows) -> Tensor:
        """(b, planes, C, H, W) keyed smooth directions, orthonormal and orthogonal to `at` − x."""
        x, away = rows["x"], (rows["at"] - rows["x"])[:, None]
        draws = self.setting.draws({"identity": rows["identity"]}, "surfree", rows["t"])
        whole = torch.cat([away, smooth_noise(draws, self.planes, x, self.share)], 1).flatten(2)
        made: list[Tensor] = []
        for place in range(whole.shape[1]):  # Gram-Schmidt, in an order that no batch changes
            rest = whole[:, place]
            for unit in made:
                rest = rest - (rest * unit).sum(1, keepdim=True) * unit
            made.append(rest / rest.norm(dim=1, keepdim=True).clamp_min(1e-12))
        return torch.stack(made[1:], 1).view(len(x), self.planes, *x.shape[1:])

    def _circle(self, rows: Rows, lanes: Tensor, angles: Tensor) -> Tensor:
        """(b, k, C, H, W) the points at `angles` (b, k) of the circles towards `lanes` (b, k, C, H, W)."""
        away = rows["at"] - rows["x"]
        length = column(away.flatten(1).norm(dim=1), away)[:, None]
        cos, sin = (part[:, :, None, None, None] for part in (angles.cos(), angles.sin()))
        return rows["x"][:, None] + cos * (cos * away[:, None] + sin * length * lanes)

    def _looked(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """The sum of the directions that had an adversarial point; without any, smaller angles."""
        plus, minus = heard.hit.chunk(2, 1)
        sign = plus.float() - (minus & ~plus).float()
        lane = torch.einsum("bk,bk...->b...", sign, self._frame(rows))
        lane = lane / column(lane.flatten(1).norm(dim=1).clamp_min(1e-12), lane)
        found = sign.abs().sum(1) > 0
        first = points[torch.arange(len(sign), device=sign.device), heard.hit.int().argmax(1)]
        angle = rows["angle"] * torch.where(found, 1.0, _LESS)
        return {
            "at": rows["at"],
            "lane": lane,
            "angle": angle.clamp(1e-4, 1.0),
            "far": choose(found, first, rows["far"]),
            "phase": torch.where(found, TURN, PLANES),
        }

    def _turned(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """The largest adversarial angle along the sum; without any, the first of its directions alone."""
        hit, found = heard.hit, heard.hit.any(1)
        last = hit.shape[1] - 1 - hit.flip(1).int().argmax(1)
        taken = points[torch.arange(len(hit), device=hit.device), last]
        times = torch.tensor(_TIMES, device=hit.device)[last]
        factor = torch.where(found, times.sqrt(), _LESS)
        return {
            "at": choose(found, taken, rows["far"]),
            "angle": (rows["angle"] * factor).clamp(1e-4, 1.0),
            "phase": torch.full_like(rows["phase"], PLANES),
        }


@dataclass(frozen=True, kw_only=True)
class SurFree(DecisionAttack):
    """SurFree (Maho et al. 2021, arXiv:2011.12807): random smooth planes instead of gradient estimates, in l2.

    Departures from the paper: several planes are tried side by side with one angle each way, and their adversarial
    directions are summed before the largest angle is searched; directions are orthogonal to those of the same turn.

    Attributes:
        planes: directions that are tried side by side.
        angle: first angle in degrees.
        share: lowest frequencies of each axis that directions are made of, in (0, 1]; at least ten.
    """

    planes: int = 5
    angle: float = 15.0
    share: float = 0.5

    def rule(self, setting: Setting) -> SurFreeRule:
        """See `DecisionAttack.rule`."""
        if self.planes < 1 or not 0 < self.angle < 60 or not 0 < self.share <= 1:
            raise RobustError(
                f"planes={self.planes}, angle={self.angle}, share={self.share}: at least 1, in (0, 60), in (0, 1]"
            )
        return SurFreeRule(setting, self.queries, self.planes, self.angle, self.share)
