"""HopSkipJump: gradient directions at the boundary estimated from labels (Chen et al. 2020, arXiv:1904.02144)."""

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

ESTIMATE, STRIDE = 2, 3


class HopSkipJumpRule(DecisionRule):
    """Algorithm 2 of the paper, every row at its own iteration.

    ESTIMATE asks B_k = B_0 √k points around the boundary point and averages their directions, signed by the outcome
    and centred (eq. 16). STRIDE halves the step ‖x − at‖ / √k along it until the point is adversarial. Then the
    bisection follows.
    """

    def __init__(self, setting: Setting, queries: int, initial: int, gamma: float) -> None:
        super().__init__(setting, queries)
        self.initial = min(initial, -(-queries // 20))  # a small budget takes several iterations too
        self.gamma = gamma

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        count = x[0].numel()
        power = 2.0 if self.setting.threat.norm == "linf" else 1.5
        self.theta = self.gamma / count**power  # the bisection's precision, and the scale of the probing
        self.tolerance = max(self.theta, 1e-6)
        zeros = torch.zeros(len(x), device=x.device)
        own |= {"round": torch.zeros_like(own["t"]), "probed": zeros, "agreed": zeros.clone()}
        own |= {"signed": torch.zeros_like(x), "plain": torch.zeros_like(x)}
        own |= {"direction": torch.zeros_like(x), "size": zeros.clone()}
        return own

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == ESTIMATE:
            return rows["at"][:, None] + column(self._delta(rows), rows["at"])[:, None] * self._directions(
                rows
            )
        if phase == STRIDE:
            return (rows["at"] + column(rows["size"], rows["at"]) * rows["direction"])[:, None]
        return super().propose(phase, rows)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == ESTIMATE:
            return self._estimated(rows, points, heard)
        if phase == STRIDE:
            return self._strode(rows, points, heard)
        return super().learn(phase, rows, points, heard)

    def landed(self, rows: Rows, at: Tensor) -> State:
        """The next iteration's estimate."""
        zeros = torch.zeros_like(at)
        flat = torch.zeros(len(at), device=at.device)
        new: State = {"phase": torch.full_like(rows["phase"], ESTIMATE), "round": rows["round"] + 1}
        return new | {"signed": zeros, "plain": zeros, "probed": flat, "agreed": flat}

    def _delta(self, rows: Rows) -> Tensor:
        """(b,) how far the probes reach: √d θ ‖at − x‖ in l2, d θ ‖at − x‖ in linf; a tenth of the box at first."""
        count = rows["x"][0].numel()
        away = self.setting.threat.distance(rows["at"], rows["x"]).float()
        factor = count if self.setting.threat.norm == "linf" else math.sqrt(count)
        low, high = self.setting.bounds
        return torch.where(rows["round"] == 1, 0.1 * (high - low), factor * self.theta * away).clamp_min(1e-6)

    def _directions(self, rows: Rows) -> Tensor:
        """(b, width, C, H, W) keyed random directions of l2 length one."""
        x = rows["x"]
        draws = self.setting.draws({"identity": rows["identity"]}, "hopskipjump", rows["t"])
        if self.setting.threat.norm == "linf":
            noise = 2 * draws.uniform(self.width, *x.shape[1:]).to(x) - 1
        else:
            noise = draws.normal(self.width, *x.shape[1:]).to(x)
        length = noise.flatten(2).norm(dim=2).clamp_min(1e-12)
        unit: Tensor = noise / length.view(*noise.shape[:2], *[1] * (x.dim() - 1))
        return unit

    def _estimated(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """Sums over the probes; the direction once there are enough of them."""
        at = rows["at"]
        probes = (points - at[:, None]) / column(self._delta(rows), at)[:, None]  # after the cut to the box
        weight = heard.asked.float()
        sign = (2 * heard.hit.float() - 1) * weight
        new: State = {
            "signed": rows["signed"] + torch.einsum("bk,bk...->b...", sign, probes),
            "plain": rows["plain"] + torch.einsum("bk,bk...->b...", weight, probes),
            "probed": rows["probed"] + weight.sum(1),
            "agreed": rows["agreed"] + sign.sum(1),
        }
        wanted = (self.initial * rows["round"].float().sqrt()).clamp_max(10_000)
        full = new["probed"] >= wanted
        mean = column(new["agreed"] / new["probed"].clamp_min(1), at)
        same = mean.abs() == 1  # all outcomes agree: centring would leave nothing
        centred = new["signed"] - torch.where(same, 0.0, mean) * new["plain"]
        away = self.setting.threat.distance(at, rows["x"]).float()
        new["direction"] = choose(full, self.setting.threat.steepest(centred), rows["direction"])
        new["size"] = torch.where(full, away / rows["round"].clamp_min(1).sqrt(), rows["size"])
        new["phase"] = torch.where(full, STRIDE, rows["phase"])
        return new

    def _strode(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """An adversarial point is the far end of the next bisection; else half the step."""
        hit = heard.hit[:, 0]
        tiny = ~hit & (rows["size"] < 1e-7)
        new = self.approach(choose(hit, points[:, 0], rows["at"]))
        new["phase"] = torch.where(hit | tiny, new["phase"], rows["phase"])
        return new | {"size": torch.where(hit, rows["size"], rows["size"] / 2)}


@dataclass(frozen=True, kw_only=True)
class HopSkipJump(DecisionAttack):
    """HopSkipJump (Chen et al. 2020, arXiv:1904.02144): the smallest perturbation from labels alone, in l2 or linf.

    Attributes:
        initial: B_0, probes of the first gradient estimate, at most a twentieth of the budget; the k-th takes √k times
            as many.
        gamma: precision of the bisection, γ / d√d of the way in l2 and γ / d² in linf.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    initial: int = 100
    gamma: float = 1.0

    def rule(self, setting: Setting) -> HopSkipJumpRule:
        """See `DecisionAttack.rule`."""
        if self.initial < 1 or not self.gamma > 0:
            raise RobustError(f"initial={self.initial}, gamma={self.gamma}: at least 1, and positive")
        return HopSkipJumpRule(setting, self.queries, self.initial, self.gamma)
