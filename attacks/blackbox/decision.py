"""What decision-based attacks share: a first adversarial point, and the way back from it to the decision boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Knowledge, Until
from robust.attacks.blackbox.budgeted import BudgetedAttack
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import Setting, State, choose, column

SEEK, APPROACH = 0, 1


class DecisionRule(PhasedRule):
    """Phase SEEK finds an adversarial point, APPROACH bisects the line from it to the clean point; then `landed`.

    State `at` is the row's adversarial point (the clean one before there is any), `low` and `high` bound the boundary
    on the way from the clean point (0) to `far` (1), the far end of the bisection.

    Attributes:
        width: points that a row asks in a turn where the method has several at once.
        tries: keyed points that SEEK asks before it gives a row up.
        tolerance: the bisection ends when high − low is below this share of the way.
    """

    width = 10
    tries = 200
    tolerance = 1e-3

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        own["at"], own["far"] = x.clone(), x.clone()
        own["low"] = torch.zeros(len(x), device=x.device)
        own["high"] = torch.ones(len(x), device=x.device)
        return own

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == SEEK:
            return self._candidates(rows)
        if phase == APPROACH:
            return self.between(rows["x"], rows["far"], (rows["low"] + rows["high"]) / 2)[:, None]
        return super().propose(phase, rows)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == SEEK:
            return self._sought(rows, points, heard)
        if phase == APPROACH:
            return self._approached(rows, points, heard)
        return super().learn(phase, rows, points, heard)

    def landed(self, rows: Rows, at: Tensor) -> State:
        """What follows for rows whose bisection has ended at `at` (b, C, H, W): `phase` and entries of its own."""
        raise TypeError(f"{type(self).__name__} does not go on from the boundary")

    def between(self, x: Tensor, far: Tensor, share: Tensor) -> Tensor:
        """The point at `share` (b,) of the way from x to far: a straight line; in linf, far cut to a smaller cube."""
        if self.setting.threat.norm != "linf":
            return torch.lerp(x, far, column(share, x))
        reach = column((far - x).flatten(1).abs().amax(1) * share, x)
        return far.maximum(x - reach).minimum(x + reach)

    def approach(self, far: Tensor) -> State:
        """The entries of rows that begin a bisection from the adversarial point `far` (b, C, H, W)."""
        ones = torch.ones(len(far), device=far.device)
        return {"phase": ones.long() * APPROACH, "at": far, "far": far, "low": ones * 0, "high": ones}

    def _candidates(self, rows: Rows) -> Tensor:
        """Points to start from: the given one, plain and inverted images, then noise mixed into the clean point.

        Each turn mixes in ever more of it; the noise is uniform in even turns and black and white in odd ones.
        """
        x, width = rows["x"], self.width
        low, high = self.setting.bounds
        draws = self.setting.draws({"identity": rows["identity"]}, "seek", rows["t"])
        noise = draws.uniform(width, *x.shape[1:]).to(x)
        noise = torch.where((rows["t"] % 2 == 1).view(-1, *[1] * x.dim()), noise.round(), noise)
        share = torch.linspace(1 / width, 1.0, width, device=x.device).view(1, -1, *[1] * (x.dim() - 1))
        points = torch.lerp(x[:, None].expand_as(noise), low + (high - low) * noise, share.expand_as(noise))
        first = [torch.full_like(x, low), torch.full_like(x, high), low + high - x]
        if "begin" in rows:
            first.insert(0, rows["begin"])
        fresh = rows["t"] == 0
        for place, point in enumerate(first[: width - 1]):
            points[:, place] = choose(fresh, point, points[:, place])
        return points

    def _sought(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """The nearest adversarial candidate becomes the far end; rows that have tried enough end."""
        x = rows["x"]
        length = (points - x[:, None]).flatten(2).norm(dim=2)
        nearest = torch.where(heard.hit, length, torch.inf).argmin(1)
        found = heard.hit.any(1)
        far = choose(found, points[torch.arange(len(x), device=x.device), nearest], rows["far"])
        new = self.approach(far)
        spent = rows["spent"] >= self.tries
        new["phase"] = torch.where(found, APPROACH, torch.where(spent, self.DONE, SEEK))
        return new

    def _approached(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        middle, hit, asked = (rows["low"] + rows["high"]) / 2, heard.hit[:, 0], heard.asked[:, 0]
        new: State = {
            "low": torch.where(asked & ~hit, middle, rows["low"]),
            "high": torch.where(hit, middle, rows["high"]),
            "at": choose(hit, points[:, 0], rows["at"]),
            "phase": rows["phase"],
        }
        over = new["high"] - new["low"] <= self.tolerance
        if bool(over.any()):
            for name, value in self.landed(rows, new["at"]).items():
                before = new[name] if name in new else rows[name]
                new[name] = torch.where(over.view(-1, *[1] * (before.dim() - 1)), value, before)
        return new


@dataclass(frozen=True, kw_only=True)
class DecisionAttack(BudgetedAttack):
    """What decision-based attacks have in common: labels only, a budget of queries, the smallest perturbation.

    Attributes:
        queries: the most queries per sample, beside the one for the clean point.
    """

    knowledge: ClassVar[Knowledge] = "decision"
    minimum_norm: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    until: Until = "smallest"
    queries: int = 5000

    def rule(self, setting: Setting) -> PhasedRule:
        """The method's rule with this attack's fields."""
        raise TypeError(f"{type(self).__name__} has no rule")

    def build(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `BudgetedAttack.build`."""
        return self.rule(setting)
