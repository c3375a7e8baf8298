"""JSMA: pairs of coordinates picked by a saliency map of the Jacobian (Papernot et al. 2016, arXiv:1511.07528)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, choose
from robust.attacks.targets import ranked_targets
from robust.attacks.trial import Trial
from robust.classifier import misclassified
from robust.errors import RobustError
from robust.losses import Loss, cross_entropy, margin
from robust.rng import JOB_BITS

_AT_ONCE = 1 << 22  # pairs that are looked at together, of all rows


def target_logit(
    logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """The margin in value, with the gradient of the target's logit."""
    assert targets is not None
    own = logits.gather(1, targets[:, None])[:, 0]
    return margin(logits, y, targets).detach() + own - own.detach()


def all_logits(
    logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """The margin in value, with the gradient of the sum of all logits."""
    total = logits.sum(1)
    return margin(logits, y, targets).detach() + total - total.detach()


def best_pair(u: Tensor, v: Tensor, free: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of free coordinates with the largest (u_i + u_j) · (v_i + v_j), both sums positive.

    A coordinate that two others beat in u and v alike is in no pair that cannot be had as good without it. So pairs
    are formed of the first two Pareto fronts only, some dozens of coordinates, and the result is that of all n² pairs.

    Args:
        u, v: (B, n); free: (B, n) bool.

    Returns:
        (B, 2) coordinates, and (B,) their product, 0 where no pair has positive sums.
    """
    first = _front(u, v, free)
    contends = first | _front(u, v, free & ~first)
    count = max(int(contends.sum(1).max()), 2)
    places = (~contends).long().argsort(dim=1, stable=True)[:, :count]
    valid = contends.gather(1, places)
    a, b = (torch.where(valid, part.gather(1, places), -torch.inf) for part in (u, v))
    best, pair = u.new_zeros(len(u)), places[:, :2].clone()
    rows = torch.arange(count, device=u.device)
    for some in rows.split(max(1, _AT_ONCE // (len(u) * count))):
        rise, fall = (
            (a[:, some, None] + a[:, None]).clamp_min(0),
            (b[:, some, None] + b[:, None]).clamp_min(0),
        )
        product = (rise * fall * (some[:, None] != rows)).nan_to_num(0.0, 0.0).flatten(1)
        value, which = product.max(1)
        found = places.gather(1, torch.stack([some[which // count], which % count], 1))
        pair = choose(value > best, found, pair)
        best = best.maximum(value)
    return pair, best


def _front(u: Tensor, v: Tensor, free: Tensor) -> Tensor:
    """(B, n) bool: the free coordinates that no other free one reaches in both u and v."""
    order = torch.where(free, u, -torch.inf).argsort(dim=1, descending=True, stable=True)
    ranked = torch.where(free, v, -torch.inf).gather(1, order)
    highest = ranked.cummax(1).values
    ahead = ranked > torch.cat([torch.full_like(ranked[:, :1], -torch.inf), highest[:, :-1]], 1)
    return torch.zeros_like(free).scatter(1, order, ahead)


class JSMARule(Rule):
    """The paper's greedy search: the saliency of a pair is (α_i + α_j) · −(β_i + β_j), both factors positive, α the
    target's gradient and β that of the other outputs' sum; the most salient pair moves.

    The outputs of a softmax sum to one, so that the others' gradient is minus the target's and the log of the target's
    output, whose gradient has the same direction, says it all: one gradient a step. On logits a step takes two, that of
    the target's logit and that of all logits, by turns; a row moves when it has heard both.

    A row ends at its first success, and where no pair is left. A coordinate never turns back.
    """

    feasible = False

    def __init__(self, setting: Setting, steps: int, theta: float, both: bool, outputs: str) -> None:
        super().__init__(setting)
        self.asks: tuple[Loss, ...] = (cross_entropy,) if outputs == "softmax" else (target_logit, all_logits)
        self.steps = len(self.asks) * steps + 1
        self.theta = theta * (setting.bounds[1] - setting.bounds[0])
        self.ways = (1.0, -1.0) if both else (1.0,)
        self.turn = 0

    def start(self, state: State) -> State:
        """The clean point."""
        own = super().start(state)
        own["at"] = state["x"].clone()
        own["heard"] = torch.zeros_like(own["at"])
        own["over"] = torch.zeros_like(state["hit"])
        return own

    def query(self, state: State) -> Query:
        """The gradient that it is the turn of."""
        self.turn = (self.turn + 1) % len(self.asks)
        return Query(state["at"], "loss_grad", loss=self.asks[self.turn])

    def step(self, state: State, answer: Answer) -> State:
        """Rows that have heard all gradients move."""
        assert answer.gradient is not None
        aimed = state["target"] if self.setting.targeted else None
        won = misclassified(answer.scores, state["y"], aimed)
        ready = (state["t"] + 1) % len(self.asks) == 0
        own, total = answer.gradient, torch.zeros_like(answer.gradient)
        if len(self.asks) == 2:
            total = state["heard"]
            own, total = (total, own) if self.turn == 1 else (own, total)
        moved, stuck = self._moved(state, own, total) if bool(ready.any()) else (state["at"], won)
        return {
            "t": state["t"] + 1,
            "heard": answer.gradient,
            "at": choose(ready, moved, state["at"]),
            "over": won | (ready & stuck),
        }

    def _moved(self, state: State, own: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
        """The points after the most salient pair has moved, and the rows that have none."""
        x, at = state["x"].flatten(1), state["at"].flatten(1)
        low, high = self.setting.bounds
        alpha, beta = own.flatten(1), (total - own).flatten(1)
        best, delta = torch.zeros(len(x), device=x.device), torch.zeros_like(x)
        for way in self.ways:
            move = way * self.theta
            free = (at < high) & (at >= x) if move > 0 else (at > low) & (at <= x)
            if "mask" in state:
                free = free & state["mask"].flatten(1)
            pair, value = best_pair(alpha * move, -beta * move, free)
            change = torch.zeros_like(x).scatter(1, pair, move)
            delta = choose(value > best, change, delta)
            best = best.maximum(value)
        return (at + delta).clamp(low, high).view_as(state["at"]), best <= 0

    def done(self, state: State) -> Tensor:
        """Rows that have succeeded, have no pair left, or no step."""
        return state["over"] | super().done(state)


@dataclass(frozen=True, kw_only=True)
class JSMA(Attack):
    """JSMA (Papernot et al. 2016, arXiv:1511.07528): the most salient pairs of coordinates, until one succeeds.

    It aims at a target. Without one each of the likeliest wrong classes is aimed at in turn, a success is any other
    class, and the fewest pixels count, as in maximal JSMA (Wiyatno & Xu 2018, arXiv:1808.07945), from which `both` is
    too. Distances count pixels: a pair of coordinates changes one or two.

    Attributes:
        steps: pairs at most; the paper's limit on the share of changed coordinates is 2 · steps over their number.
        theta: how far a coordinate moves at once, in box widths; negative lowers.
        both: raise or lower, whichever is more salient, instead of moving all in theta's direction.
        outputs: whose Jacobian: "softmax", one gradient a step, or "logits", two. On a CIFAR ResNet-20 softmax takes
            fewer pixels.
        n_targets: the most likely wrong classes that are tried where no target is given, at most classes − 1.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    minimum_norm: ClassVar[bool] = True
    until: Until = "smallest"
    steps: int = 100
    theta: float = 1.0
    both: bool = False
    outputs: Literal["softmax", "logits"] = "softmax"
    n_targets: int = 9

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or not 0 < abs(self.theta) <= 1:
            raise RobustError(f"steps={self.steps}, theta={self.theta}: at least 1, and in [−1, 1] without 0")
        if not 1 <= self.n_targets < 1 << JOB_BITS:
            raise RobustError(f"n_targets={self.n_targets} aims at nothing; give at least 1")
        if self.outputs not in ("softmax", "logits"):
            raise RobustError(f"outputs={self.outputs!r} is unknown; use 'softmax' or 'logits'")
        aims = None if trial.targets is not None else ranked_targets(trial, self.n_targets)
        rule = JSMARule(setting_of(trial), self.steps, self.theta, self.both, self.outputs)
        run_rule(rule, trial, make_jobs(trial, targets=aims))

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`: on logits a pair takes two gradients."""
        return super().passes(**chosen) * (2 if chosen.get("outputs") == "logits" else 1)
