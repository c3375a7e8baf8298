"""GeoDA: normals of a flat decision boundary, estimated from labels (Rahmati et al. 2020, arXiv:2003.06468)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.blackbox.decision import DecisionAttack, DecisionRule
from robust.attacks.blackbox.frequencies import smooth_noise
from robust.attacks.phases import Heard, Rows
from robust.attacks.rule import Setting, State, choose
from robust.errors import RobustError

ESTIMATE, REACH, REFINE = 2, 3, 4
# How far along the normal the boundary is looked for, side by side, beside the distance so far.
_REACHES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.5, 2.5, 5.0)
_PER_ITERATION = 25  # queries for reaching the boundary, of an iteration
_FEWEST = 8  # probes of the first iteration, where the number of iterations is not given
_MOST_ITERATIONS = 50


def allocation(queries: int, iterations: int, ratio: float) -> list[int]:
    """Probes of each iteration: ratio^(-2 i / 3), the optimum of the paper (sec. 4.2), of what reaching leaves."""
    weights = [ratio ** (-2 * i / 3) for i in range(iterations)]
    left = max(queries - iterations * _PER_ITERATION, queries // 2)
    return [max(1, int(left * weight / sum(weights))) for weight in weights]


def plan_of(queries: int, iterations: int | None, ratio: float) -> list[int]:
    """The allocation; without a number of iterations, to as many as leave the first one enough probes."""
    if iterations is not None:
        return allocation(queries, iterations, ratio)
    plans = (allocation(queries, count, ratio) for count in range(_MOST_ITERATIONS, 1, -1))
    return next((plan for plan in plans if plan[0] >= _FEWEST), allocation(queries, 1, ratio))


class GeoDARule(DecisionRule):
    """Algorithm 1 of the paper, in any norm whose threat knows the shortest way to a hyperplane.

    ESTIMATE asks for points around the boundary point, moved by smooth noise; their signed sum is the normal. REACH
    asks for the shortest ways from the clean point to parallel hyperplanes, several side by side. REFINE bisects
    between the last that is not adversarial and the first that is.
    """

    width = len(_REACHES)
    tolerance = 2e-5

    def __init__(self, setting: Setting, queries: int, plan: list[int], sigma: float, share: float) -> None:
        super().__init__(setting, queries)
        self.plan, self.share = plan, share
        self.sigma = sigma * (setting.bounds[1] - setting.bounds[0])

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        self.schedule = torch.tensor(self.plan, device=x.device)
        zeros = torch.zeros_like(own["low"])
        own |= {"normal": torch.zeros_like(x), "probed": zeros, "gap": zeros.clone()}
        return own | {"round": torch.zeros_like(own["t"])}

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == ESTIMATE:
            draws = self.setting.draws({"identity": rows["identity"]}, "geoda", rows["t"])
            return rows["at"][:, None] + self.sigma * smooth_noise(draws, self.width, rows["x"], self.share)
        if phase == REACH:
            reaches = torch.tensor(_REACHES, device=rows["x"].device).expand(len(rows["x"]), -1)
            return self._towards(rows, reaches)
        if phase == REFINE:
            return self._towards(rows, ((rows["low"] + rows["high"]) / 2)[:, None])
        return super().propose(phase, rows)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == ESTIMATE:
            return self._estimated(rows, points, heard)
        if phase == REACH:
            return self._reached(rows, points, heard)
        if phase == REFINE:
            return self._refined(rows, points, heard)
        return super().learn(phase, rows, points, heard)

    def landed(self, rows: Rows, at: Tensor) -> State:
        """The next estimate, at the boundary point that was found last."""
        phase, count = torch.full_like(rows["phase"], ESTIMATE), rows["round"]
        return {"phase": phase, "round": count + 1, "probed": torch.zeros_like(rows["low"]), "at": at}

    def _towards(self, rows: Rows, reaches: Tensor) -> Tensor:
        """(b, k, C, H, W) x moved the shortest way to the hyperplanes at `reaches` (b, k) of the distance so far."""
        x, count = rows["x"], reaches.shape[1]
        gap = (rows["gap"][:, None] * reaches).flatten()
        wide, normal = (rows[name].repeat_interleave(count, 0) for name in ("x", "normal"))
        moves = self.setting.threat.to_hyperplane(wide, normal, gap, self.setting.bounds)
        return (wide + moves).view(len(x), count, *x.shape[1:])

    def _estimated(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """Adds the probes, signed by the outcome, to the normal; once there are enough, the boundary is looked for."""
        sign = (2 * heard.hit.float() - 1) * heard.asked
        normal = rows["normal"] + torch.einsum("bk,bk...->b...", sign, points - rows["at"][:, None])
        probed = rows["probed"] + heard.asked.sum(1)
        wanted = self.schedule[(rows["round"] - 1).clamp(0, len(self.plan) - 1)]
        ball = self.setting.threat
        gap = ball.dual(normal).float() * ball.distance(rows["at"], rows["x"]).float()
        phase = torch.where(probed >= wanted, REACH, ESTIMATE)
        return {"normal": normal, "probed": probed, "phase": phase, "gap": gap}

    def _reached(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """The first adversarial of the hyperplanes bounds the bisection; without any, the next estimate follows."""
        hit, found = heard.hit, heard.hit.any(1)
        first = hit.int().argmax(1)
        marks = torch.tensor((0.0, *_REACHES), device=hit.device)
        new = self.landed(rows, rows["at"])
        new["phase"] = torch.where(found, REFINE, new["phase"])
        new["round"] = torch.where(found, rows["round"], new["round"])
        far = points[torch.arange(len(hit), device=hit.device), first]
        new["at"] = choose(found, far, rows["at"])
        return new | {"low": marks[first], "high": marks[first + 1]}

    def _refined(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        middle, hit, asked = (rows["low"] + rows["high"]) / 2, heard.hit[:, 0], heard.asked[:, 0]
        low = torch.where(asked & ~hit, middle, rows["low"])
        high = torch.where(hit, middle, rows["high"])
        at = choose(hit, points[:, 0], rows["at"])
        over = high - low <= self.tolerance * high
        new = self.landed(rows, at)
        new["phase"] = torch.where(over, new["phase"], rows["phase"])
        new["round"] = torch.where(over, new["round"], rows["round"])
        return new | {"low": low, "high": high}


@dataclass(frozen=True, kw_only=True)
class GeoDA(DecisionAttack):
    """GeoDA (Rahmati et al. 2020, arXiv:2003.06468): the way to estimated boundary hyperplanes, from labels alone.

    Departures from the paper: the normals of an iteration are added up over iterations, as in the authors' code; the
    boundary is looked for at several distances side by side; frequencies are those of the two axes of
    the image, at least ten of each.

    Attributes:
        iterations: estimates of the normal, None for as many as leave the first one 8 probes.
        ratio: λ, by which the boundary's distance shrinks per iteration, in (0, 1]: it fixes the probes of each.
        sigma: step of the probes' frequencies, as a share of the box's width.
        share: lowest frequencies of each axis that noise is made of, in (0, 1].
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    iterations: int | None = None
    ratio: float = 0.6
    sigma: float = 2e-4
    share: float = 1 / 3

    def rule(self, setting: Setting) -> GeoDARule:
        """See `DecisionAttack.rule`."""
        rounds = self.iterations
        if (rounds is not None and rounds < 1) or not (
            0 < self.ratio <= 1 and 0 < self.share <= 1 and self.sigma > 0
        ):
            raise RobustError(
                f"iterations={rounds}, ratio={self.ratio}, share={self.share}, sigma={self.sigma}: "
                "at least 1, in (0, 1], in (0, 1], and positive"
            )
        plan = plan_of(self.queries, rounds, self.ratio)
        return GeoDARule(setting, self.queries, plan, self.sigma, self.share)
