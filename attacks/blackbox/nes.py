"""Natural evolution strategies: gradients from few scores, or from labels (Ilyas et al. 2018, arXiv:1804.08598)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robust.attacks.blackbox.decision import APPROACH, SEEK, DecisionRule
from robust.attacks.blackbox.score import ProbingRule, ScoreAttack, log_probabilities, radii, step_sizes
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import Setting, State, choose
from robust.errors import RobustError

Mode = Literal["query-limited", "partial-information", "label-only"]
TRY, ESTIMATE = 2, 1000
_PLATEAU = 20  # checks after which a loss that has not risen halves the step
_STEP = 0.2  # of eps: 0.01 at the paper's 0.05
_LEAST = 0.005  # of the first step: the paper's 5e-5
_WIDTH = 32


def _directions(rule: PhasedRule, rows: Rows, count: int) -> Tensor:
    x = rows["x"]
    draws = rule.setting.draws({"identity": rows["identity"]}, "nes", rows["t"])
    return draws.normal(count, *x.shape[1:]).to(x)


class NESRule(ProbingRule):
    """Section 2.2 of the paper: antithetic Gaussian pairs, and steps along their slope with momentum.

    A step size is halved when the loss is lower than `_PLATEAU` checks ago, as in the authors' code.
    """

    def __init__(
        self,
        setting: Setting,
        queries: int,
        samples: int,
        sigma: float,
        step_size: float | None,
        momentum: float,
    ) -> None:
        super().__init__(setting, queries, samples, sigma)
        self.step_size, self.momentum = step_size, momentum

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        own = super().start(state)
        size = step_sizes(self, state, self.step_size, _STEP)
        own |= {"velocity": torch.zeros_like(state["x"]), "size": size, "least": size * _LEAST}
        own["recent"] = torch.full((len(own["t"]), _PLATEAU), -torch.inf, device=own["t"].device)
        return own

    def directions(self, rows: Rows, count: int) -> Tensor:
        """See `ProbingRule.directions`."""
        return _directions(self, rows, count)

    def ascend(self, rows: Rows, slope: Tensor) -> State:
        """See `ProbingRule.ascend`."""
        velocity = self.momentum * rows["velocity"] + (1 - self.momentum) * slope
        at = self.ball(rows).step(rows["at"], velocity, rows["size"], rows["x"], self.setting.bounds)
        return {"velocity": velocity, "at": at}

    def checked(self, rows: Rows, loss: Tensor) -> State:
        """See `ProbingRule.checked`."""
        recent = torch.cat((rows["recent"][:, 1:], loss[:, None]), 1)
        stuck = recent[:, 0] > loss
        size = torch.where(stuck, (rows["size"] / 2).maximum(rows["least"]), rows["size"])
        return {"recent": recent.masked_fill(stuck[:, None], -torch.inf), "size": size}


class ShrinkingRule(DecisionRule):
    """Algorithms 2 and 3: from a point of the adversarial class, ever nearer to the clean one.

    SEEK finds that point and names its class `goal`. ESTIMATE + j is the j-th part of a slope of what is seen of the
    goal. TRY steps along the slope into a ball that is `shrink` smaller than `reach`: if the goal stays among the
    `top` classes the row is there, else it tries half the step, and at the smallest step half the shrinking.
    """

    want = "logits"

    def __init__(self, setting: Setting, attack: NES) -> None:
        super().__init__(setting, attack.queries)
        self.attack = attack
        self.copies = attack.copies if attack.mode == "label-only" else 1
        pairs = max(attack.samples // 2, 1)
        most = max(_WIDTH // (2 * self.copies), 1)
        count = -(-pairs // most)
        self.parts = [pairs // count + (j < pairs % count) for j in range(count)]
        self.width = max(2 * self.copies * self.parts[0], self.width)

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        zeros = torch.zeros(len(x), device=x.device)
        own |= {"goal": torch.zeros_like(own["t"]), "reach": zeros, "shrink": zeros.clone()}
        own |= {"size": zeros.clone(), "stride": step_sizes(self, state, self.attack.step_size, _STEP)}
        return own | {"slope": torch.zeros_like(x), "velocity": torch.zeros_like(x)}

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == TRY:
            return self._moved(rows)[:, None]
        if phase < ESTIMATE:
            return super().propose(phase, rows)
        moves = self.attack.sigma * _directions(self, rows, self.parts[phase - ESTIMATE])
        points = rows["at"][:, None] + torch.cat((moves, -moves), 1)
        if self.copies == 1:
            return points
        draws = self.setting.draws({"identity": rows["identity"]}, "nes-copies", rows["t"])
        noise = 2 * draws.uniform(points.shape[1], self.copies, *points.shape[2:]).to(points) - 1
        return (points[:, :, None] + self.attack.radius * noise).flatten(1, 2)

    def _moved(self, rows: Rows) -> Tensor:
        ball = self.setting.threat.with_eps(self._reach(rows))
        return ball.step(rows["at"], rows["velocity"], rows["size"], rows["x"], self.setting.bounds)

    def _reach(self, rows: Rows) -> Tensor:
        """(b,) the radius that a row tries: never below eps."""
        return (rows["reach"] - rows["shrink"]).maximum(radii(self, rows))

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == SEEK:
            return self._begun(rows, points, heard)
        if phase == TRY:
            return self._tried(rows, points, heard)
        return self._estimated(phase - ESTIMATE, rows, heard)

    def _begun(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """The nearest adversarial candidate; its class is the goal, which a target is anyway."""
        new = super().learn(SEEK, rows, points, heard)
        found = new["phase"] == APPROACH
        place = (points == new["at"][:, None]).flatten(2).all(2).int().argmax(1)
        new["goal"] = heard.scores[torch.arange(len(place), device=place.device), place].argmax(1)
        new["reach"] = self.setting.threat.distance(new["at"], rows["x"]).float()
        new |= {"shrink": new["reach"] / 2, "size": rows["stride"]}
        new["phase"] = torch.where(found, self._following(rows, 0), new["phase"])
        return new

    def _rank(self, rows: Rows, scores: Tensor) -> Tensor:
        """(b, k) how many classes score above the goal, counted up to `top`: more is not seen."""
        goal = rows["goal"][:, None, None].expand(-1, scores.shape[1], 1)
        above = (scores > scores.gather(2, goal)).sum(2)
        return above.clamp_max(self.attack.top)

    def _worth(self, rows: Rows, heard: Heard) -> tuple[Tensor, Tensor]:
        """(b, k) what each point says about the goal, and whether it says anything."""
        rank = self._rank(rows, heard.scores)
        if self.copies > 1:
            share = (1 - rank / self.attack.top).unflatten(1, (-1, self.copies)).mean(2)
            return share, torch.ones_like(share)
        goal = rows["goal"][:, None, None].expand(-1, rank.shape[1], 1)
        value = log_probabilities(heard.scores).gather(2, goal)[..., 0].nan_to_num(0.0, 0.0, 0.0)
        return value, (rank < self.attack.top).to(value)

    def _estimated(self, part: int, rows: Rows, heard: Heard) -> State:
        """Adds a part's slope; points that do not show the goal say nothing."""
        value, seen = self._worth(rows, heard)
        mean = (value * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp_min(1)
        plus, minus = ((value - mean) * seen).chunk(2, 1)
        moves = _directions(self, rows, self.parts[part])
        weight = (plus - minus).view(*plus.shape, *[1] * (moves.dim() - 2))
        slope = rows["slope"] + (weight * moves).sum(1)
        if part + 1 < len(self.parts):
            return {"slope": slope, "phase": self._following(rows, part + 1)}
        momentum = self.attack.momentum
        velocity = momentum * rows["velocity"] + (1 - momentum) * slope
        return {
            "slope": torch.zeros_like(slope),
            "velocity": velocity,
            "size": rows["stride"],
            "phase": torch.full_like(rows["phase"], TRY),
        }

    def _tried(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        kept = (self._rank(rows, heard.scores)[:, 0] < self.attack.top) & heard.asked[:, 0]
        least = ~kept & (rows["size"] <= _LEAST * rows["stride"])
        shrink = torch.where(
            kept, rows["shrink"] * 1.5, torch.where(least, rows["shrink"] / 2, rows["shrink"])
        )
        return {
            "at": choose(kept, points[:, 0], rows["at"]),
            "reach": torch.where(kept, self._reach(rows), rows["reach"]),
            "shrink": shrink.minimum(rows["reach"] / 2),
            "size": torch.where(kept | least, rows["stride"], rows["size"] / 4),
            "phase": torch.where(kept | least, self._following(rows, 0), TRY),
        }

    def _following(self, rows: Rows, part: int) -> Tensor:
        """(b,) the part of a slope, or TRY along the old one where the budget ends before."""
        enough = self.steps - rows["spent"] > 2 * self.copies * self.parts[part]
        return torch.where(enough, ESTIMATE + part, TRY)


@dataclass(frozen=True, kw_only=True)
class NES(ScoreAttack):
    """NES (Ilyas et al. 2018, arXiv:1804.08598): gradients estimated from a few scores, or from labels.

    "query-limited" climbs the margin from the clean point. The other two start from a point of the adversarial class,
    `begin`, else keyed noise, and come nearer while they keep the class. Without a target that class is the one which
    the first adversarial point has.

    Attributes:
        mode: "query-limited": all scores are seen; "partial-information": those of the `top` best classes;
            "label-only": which classes those are, averaged over noisy copies.
        samples: points per gradient, in antithetic pairs; in "query-limited" at most a 20th of `queries`.
        sigma: standard deviation of the points around the iterate.
        step_size: first length of a step in the threat's norm; None for eps / 5, the paper's 0.01 at 0.05.
        momentum: share of the old direction in the new one, in [0, 1).
        top: classes that are seen in the partial modes.
        copies: noisy copies of each point in "label-only".
        radius: how far the copies' uniform noise reaches.
    """

    mode: Mode = "query-limited"
    samples: int = 50
    sigma: float = 0.001
    step_size: float | None = None
    momentum: float = 0.9
    top: int = 1
    copies: int = 50
    radius: float = 0.001

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `ScoreAttack.rule`."""
        if self.mode not in get_args(Mode):
            raise RobustError(f"mode={self.mode!r} is unknown; use one of {', '.join(get_args(Mode))}")
        self.positive("samples", "sigma", "step_size", "top", "copies", "radius")
        if not 0 <= self.momentum < 1:
            raise RobustError(f"momentum={self.momentum} must be in [0, 1)")
        if self.mode == "query-limited":
            return NESRule(setting, self.queries, self.samples, self.sigma, self.step_size, self.momentum)
        return ShrinkingRule(setting, self)
