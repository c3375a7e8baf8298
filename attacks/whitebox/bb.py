"""Brendel & Bethge attack: along the boundary towards the clean point (Brendel et al. 2019, arXiv:1907.01003)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.query import Answer, Query, Want
from robust.attacks.rule import Setting, State, choose, column
from robust.attacks.several import spread
from robust.attacks.trial import Trial
from robust.attacks.whitebox.minimum import MinimumAttack, MinimumRule
from robust.attacks.whitebox.trust_region import Problem, solve
from robust.classifier import misclassified
from robust.errors import RobustError
from robust.losses import get as get_loss

_WIDTH = 10  # points that the first turn tries
_HALVINGS = 10  # of the way from the starting point to the boundary


@dataclass(frozen=True)
class Walk:
    """How the attack follows the boundary; see `BB`."""

    radius: float
    decay: float
    decays: int
    momentum: float
    overshoot: float


class BBRule(MinimumRule):
    """The paper's walk; every row is at the same turn since it was seated.

    Turn 0 tries points to start from: the given one, or uniform noise mixed into the clean point. The next turns halve
    the way from the nearest adversarial one to the boundary. Then every step linearises the margin, averaged over the
    steps, and goes to the smallest perturbation on the boundary's plane within the trust region and the box. A row
    without a starting point walks from the clean one, in the first trust region, until it has crossed the boundary.
    """

    def __init__(self, setting: Setting, steps: int, walk: Walk) -> None:
        super().__init__(setting, steps, get_loss("margin"))
        self.walk = walk
        self.walks_at = 1 + _HALVINGS  # the first turn with a gradient
        self.steps = self.walks_at + steps + 1

    def start(self, state: State) -> State:
        """See `MinimumRule.start`."""
        own = super().start(state)
        own["far"] = own["at"].clone()
        own["low"] = torch.zeros(len(state["x"]), device=state["x"].device)
        own["high"] = own["low"] + 1
        own["crossed"] = torch.zeros_like(state["hit"])
        own["normal"] = torch.zeros_like(state["x"])
        return own

    def query(self, state: State) -> Query:
        """Several points of the rows in their first turn; gradients where any row needs one."""
        clock = state["t"] if self.clock is None else self.clock
        walking = bool((clock >= self.walks_at).any()) and not self.ending(state)
        want: Want = "loss_grad" if walking else "logits"
        if not bool((clock == 0).any()):
            return Query(self._point(state), want, loss=self.loss)
        points = self._candidates(state)
        first = state["t"] == 0
        points[:, 0] = choose(first, points[:, 0], self._point(state))
        asked = first[:, None] | (torch.arange(_WIDTH, device=first.device) == 0)
        return Query(points.flatten(0, 1), want, loss=self.loss, asked=asked.flatten())

    def _point(self, state: State) -> Tensor:
        """The middle of the way while it is halved, else the iterate."""
        halving = (state["t"] > 0) & (state["t"] < self.walks_at) & state["crossed"]
        share = column((state["low"] + state["high"]) / 2, state["x"])
        return choose(halving, torch.lerp(state["x"], state["far"], share), state["at"])

    def _candidates(self, state: State) -> Tensor:
        """(B, width, C, H, W) the given point, if any, then the clean point with ever more noise mixed in."""
        x, (low, high) = state["x"], self.setting.bounds
        noise = low + (high - low) * self.setting.draws(state, "bb").uniform(_WIDTH, *x.shape[1:]).to(x)
        share = torch.linspace(1 / _WIDTH, 1.0, _WIDTH, device=x.device).view(1, -1, *[1] * (x.dim() - 1))
        points = torch.lerp(x[:, None].expand_as(noise), noise, share.expand(len(x), *share.shape[1:]))
        points = points.clamp(low, high)
        if "begin" in state:
            points[:, 0] = state["begin"]
        return points

    def step(self, state: State, answer: Answer) -> State:
        """What each row learns in its turn."""
        t, x = state["t"], state["x"]
        each = len(answer.scores) // len(x)
        target = spread(state["target"], each) if self.setting.targeted else None
        hits = misclassified(answer.scores, spread(state["y"], each), target).view(len(x), each)
        changed = self._halved(state, hits[:, 0])
        if each > 1:
            changed = _by_row(t == 0, self._sought(state, hits), changed)
        if answer.gradient is not None and answer.loss is not None:
            walks = t >= self.walks_at
            moved = self.move(state, hits[:, 0], answer.loss[::each], answer.gradient[::each])
            changed = _by_row(walks, moved, changed)
        return changed | {"t": t + 1}

    def _sought(self, state: State, hits: Tensor) -> State:
        """The nearest adversarial candidate is the far end, the given one before all."""
        x, points = state["x"], self._candidates(state)
        length = (points - x[:, None]).flatten(2).norm(dim=2)
        if "begin" in state:
            length[:, 0] = 0
        nearest = torch.where(hits, length, torch.inf).argmin(1)
        found, far = hits.any(1), points[torch.arange(len(x), device=x.device), nearest]
        return self._kept(state) | {
            "far": choose(found, far, x),
            "at": choose(found, far, x),
            "crossed": found,
        }

    def _halved(self, state: State, hit: Tensor) -> State:
        """The half of the way that the boundary is in; `at` is its adversarial end."""
        halving = (state["t"] > 0) & (state["t"] < self.walks_at) & state["crossed"]
        middle = (state["low"] + state["high"]) / 2
        return self._kept(state) | {
            "low": torch.where(halving & ~hit, middle, state["low"]),
            "high": torch.where(halving & hit, middle, state["high"]),
            "at": choose(halving & hit, self._point(state), state["at"]),
        }

    def _kept(self, state: State) -> State:
        return {name: state[name] for name in ("at", "far", "low", "high", "crossed", "normal")}

    def move(self, state: State, hit: Tensor, loss: Tensor, gradient: Tensor) -> State:
        """See `MinimumRule.move`."""
        walk, x, at = self.walk, state["x"], state["at"]
        count = state["t"] - self.walks_at
        crossed = state["crossed"] | hit
        kept = torch.where(count > 0, walk.momentum, 0.0)
        normal = torch.lerp(gradient, state["normal"], column(kept, x))
        flat, clean = normal.double().flatten(1), x.double().flatten(1)
        present = at.double().flatten(1) - clean
        factor = torch.where(loss < 0, walk.overshoot, 2 - walk.overshoot)
        level = (flat * present).sum(1, keepdim=True) - (factor * loss).double()[:, None]
        low, high = self.setting.bounds
        width = (high - low) * clean.shape[1] ** 0.5
        every = max(self.gradients // walk.decays, 1)
        decays = torch.where(crossed, torch.div(count + 1, every, rounding_mode="floor"), 0)
        radius = walk.radius * width * walk.decay ** decays.double()[:, None]
        problem = Problem(present, flat, level, low - clean, high - clean, radius, x.shape[1])
        moved = clean + solve(problem, self.setting.threat.norm, exact=1e-3, slack=0.1)
        following = moved.view_as(x).to(x.dtype).clamp(low, high)
        return self._kept(state) | {"at": following, "normal": normal, "crossed": crossed}


def _by_row(mask: Tensor, yes: State, no: State) -> State:
    return {name: choose(mask, yes[name], no[name]) for name in yes}


@dataclass(frozen=True, kw_only=True)
class BB(MinimumAttack):
    """Brendel & Bethge attack (Brendel et al. 2019, arXiv:1907.01003): along the boundary, in l0, l1, l2 and linf.

    It starts at `begin` where that is adversarial, else at noise. The paper counts coordinates in l0, here it is
    pixels changed in any channel. A heuristic: it stays on the side of the boundary that its start led to, and even a
    linear model has a local optimum for each class. In l1 and l0 the way from noise takes the paper's many steps.

    Attributes:
        steps: gradients; the paper takes 1,000.
        radius: of the first trust region, as a share of the box's diagonal.
        decay: by which the radius shrinks at regular intervals, in (0, 1).
        decays: how often it does; None for 20, in l0 5: a radius below a pixel's change resets none.
        momentum: weight of the earlier steps in the boundary's direction, in [0, 1).
        overshoot: share of the way to the boundary that a step goes from the clean side, in [1, 2]; from the other
            side it goes 2 − overshoot.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1", "l0")
    heuristic: ClassVar[bool] = True
    steps: int = 1000
    radius: float = 0.05
    decay: float = 0.5
    decays: int | None = None
    momentum: float = 0.8
    overshoot: float = 1.1

    def rule(self, trial: Trial, setting: Setting) -> BBRule:
        """See `MinimumAttack.rule`."""
        usual = 5 if self.threat.norm == "l0" else 20
        decays = usual if self.decays is None else self.decays
        if not self.radius > 0 or not 0 < self.decay < 1 or decays < 1:
            raise RobustError(
                f"radius={self.radius}, decay={self.decay}, decays={decays}: positive, in (0, 1), at least 1"
            )
        if not 0 <= self.momentum < 1 or not 1 <= self.overshoot <= 2:
            raise RobustError(
                f"momentum={self.momentum}, overshoot={self.overshoot}: in [0, 1), and in [1, 2]"
            )
        walk = Walk(self.radius, self.decay, decays, self.momentum, self.overshoot)
        return BBRule(setting, self.steps, walk)
