"""Sign-OPT: the distance along a direction, descended by signs of its slopes (Cheng et al. 2020, arXiv:1909.10773)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.blackbox.decision import DecisionAttack, DecisionRule
from robust.attacks.phases import Heard, Rows
from robust.attacks.rule import Setting, State, choose, column
from robust.errors import RobustError

ESTIMATE, DESCEND, NARROW = 2, 3, 4
_TIMES = (
    1 / 64,
    1 / 16,
    1 / 4,
    1.0,
    4.0,
    16.0,
)  # step sizes that are asked about side by side, in the row's own
_NEAR = (0.5, 1.0, 2.0)  # the same once one of them has led nearer
_FIRST_CUT, _LAST_CUT, _WIDEST_CUT = 0.04, 5e-3, 0.32


class SignOPTRule(DecisionRule):
    """Algorithm 1 of the paper: g(θ), how far the boundary is along the direction θ, goes down by signed slopes.

    ESTIMATE asks for points beside the boundary, at θ + ε u: adversarial means that u leads downhill. DESCEND asks for
    points along θ − η ĝ, for several η, that are nearer by a cut; NARROW for three η around what led nearer, by a cut
    that doubles until the first failure and halves from there on. Once it is small a bisection leads to the boundary.
    """

    width = 25

    def __init__(self, setting: Setting, queries: int, probes: int, smoothing: float, step: float) -> None:
        super().__init__(setting, queries)
        self.probes = min(probes, -(-queries // 5))  # a small budget takes a few steps too
        self.smoothing, self.first = smoothing, step

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        zeros = torch.zeros_like(own["low"])
        self.scale = self.smoothing / math.sqrt(x[0].numel())  # of a probe's coordinate, beside the distance
        self.tolerance = self.scale / 4
        own |= {"signed": torch.zeros_like(x), "probed": zeros, "cut": zeros.clone(), "rising": zeros.clone()}
        return own | {"base": x.clone(), "size": torch.full_like(zeros, self.first)}

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == ESTIMATE:
            draws = self.setting.draws({"identity": rows["identity"]}, "sign-opt", rows["t"])
            noise = draws.normal(self.width, *rows["x"].shape[1:]).to(rows["x"])
            away = (rows["at"] - rows["x"]).flatten(1).norm(dim=1)
            return rows["at"][:, None] + column(self.scale * away, noise) * noise
        if phase in (DESCEND, NARROW):
            return self._at(
                rows,
                self._turned(rows, _TIMES if phase == DESCEND else _NEAR),
                self._distance(rows) * (1 - rows["cut"]),
            )
        return super().propose(phase, rows)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == ESTIMATE:
            return self._estimated(rows, points, heard)
        if phase in (DESCEND, NARROW):
            return self._descended(rows, points, heard, _TIMES if phase == DESCEND else _NEAR)
        return super().learn(phase, rows, points, heard)

    def landed(self, rows: Rows, at: Tensor) -> State:
        """The next estimate, around the point on the boundary."""
        flat = torch.zeros(len(at), device=at.device)
        return {"phase": flat.long() + ESTIMATE, "base": at, "signed": torch.zeros_like(at), "probed": flat}

    def _distance(self, rows: Rows) -> Tensor:
        return self.setting.threat.length(rows["at"] - rows["x"]).float()

    def _along(self, point: Tensor, x: Tensor, length: float) -> Tensor:
        """(b, C, H, W) from x towards a point, of this length in the threat's norm."""
        delta = point - x
        return delta * column(length / self.setting.threat.length(delta).float().clamp_min(1e-12), x)

    def _at(self, rows: Rows, directions: Tensor, distance: Tensor) -> Tensor:
        """(b, k, C, H, W) the points at a distance (b,) along directions."""
        size = self.setting.threat.length(directions.flatten(0, 1)).float().clamp_min(1e-12)
        share = distance[:, None] / size.view(directions.shape[:2])
        return rows["x"][:, None] + directions * share[:, :, None, None, None]

    def _turned(self, rows: Rows, factors: tuple[float, ...]) -> Tensor:
        """(b, k, C, H, W) θ − η ĝ for every η."""
        unit = self._along(rows["base"], rows["x"], 1.0)
        times = rows["size"][:, None] * torch.tensor(factors, device=unit.device)
        downhill = self.setting.threat.steepest(rows["signed"])
        return unit[:, None] + times[:, :, None, None, None] * downhill[:, None]

    def _estimated(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """Adds the probes, signed by the outcome; once there are enough, the descent begins.

        If all probes of a turn are adversarial the row is not at the boundary: it bisects all of the way again.
        """
        sign = (2 * heard.hit.float() - 1) * heard.asked
        signed = rows["signed"] + torch.einsum("bk,bk...->b...", sign, points - rows["base"][:, None])
        probed = rows["probed"] + heard.asked.sum(1)
        full = probed >= self.probes
        phase = torch.where(full, DESCEND, ESTIMATE)
        cut, rising = torch.full_like(probed, _FIRST_CUT), torch.ones_like(probed)
        again = self.approach(rows["at"])
        again["phase"] = torch.where(heard.hit.all(1), again["phase"], phase)
        return again | {"signed": signed, "probed": probed, "cut": cut, "rising": rising}

    def _descended(self, rows: Rows, points: Tensor, heard: Heard, factors: tuple[float, ...]) -> State:
        """The middle one of the step sizes that led nearer is the row's; without any, half the cut."""
        hit, found, cut = heard.hit, heard.hit.any(1), rows["cut"]
        middle = ((hit.cumsum(1) * 2 >= hit.sum(1, keepdim=True)) & hit).int().argmax(1)
        at = choose(found, points[torch.arange(len(hit), device=hit.device), middle], rows["at"])
        times = torch.tensor(factors, device=hit.device)
        size = torch.where(found, (rows["size"] * times[middle]).clamp(1e-4, 1e4), rows["size"])
        rising = rows["rising"].bool() & found
        cut = torch.where(rising, (2 * cut).clamp_max(_WIDEST_CUT), cut / 2)
        again = torch.where(found, NARROW, rows["phase"])
        new = self.approach(at)
        new["low"] = new["low"] + (1 - 4 * _LAST_CUT)
        new["phase"] = torch.where(cut < _LAST_CUT, new["phase"], again)
        return new | {"size": size, "cut": cut, "rising": rising.float()}


@dataclass(frozen=True, kw_only=True)
class SignOPT(DecisionAttack):
    """Sign-OPT (Cheng et al. 2020, arXiv:1909.10773): one query per slope of the boundary's distance, in l2 or linf.

    Departures from the paper: it starts at the nearest of noisy points instead of the best of 100 directions; a probe
    adds to the boundary point without being cut back to its distance, which in linf would make all probes agree;
    several step sizes are tried side by side. In linf, directions have length one in that norm and move by signs.

    Attributes:
        probes: Q, slopes of one gradient estimate; at most a fifth of the budget.
        smoothing: ε, length of the probes' steps as a share of the distance.
        step: first η, length of the step along the estimate beside a direction of length one.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    probes: int = 200
    smoothing: float = 1e-3
    step: float = 0.2

    def rule(self, setting: Setting) -> SignOPTRule:
        """See `DecisionAttack.rule`."""
        if self.probes < 1 or not (self.smoothing > 0 and self.step > 0):
            raise RobustError(
                f"probes={self.probes}, smoothing={self.smoothing}, step={self.step}: at least 1, and positive"
            )
        return SignOPTRule(setting, self.queries, self.probes, self.smoothing, self.step)
