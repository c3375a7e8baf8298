"""What score-based attacks share: a budget of queries, and slopes estimated from pairs of points around one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Knowledge
from robust.attacks.blackbox.budgeted import BudgetedAttack
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import Setting, State, choose
from robust.errors import RobustError
from robust.losses import get as get_loss
from robust.rng import Draws
from robust.threat import Threat

CHECK, PROBE, LAST = 0, 1, 1000
_MOST = 16  # pairs of a row in one turn: more would fill the memory with large images
_SHARE = 20  # steps that a small budget is still cut into


def log_probabilities(scores: Tensor) -> Tensor:
    """(…, K) scores as log-probabilities: the logarithm of what is a distribution already, else log-softmax."""
    known = (scores >= 0).all(-1) & ((scores.sum(-1) - 1).abs() < 1e-3)
    return torch.where(known[..., None], scores.clamp_min(1e-12).log(), scores.log_softmax(-1))


class ScoreRule(PhasedRule):
    """A phased rule that climbs the margin, which is positive exactly where a point is adversarial."""

    want = "logits"

    def __init__(self, setting: Setting, queries: int) -> None:
        super().__init__(setting, queries, get_loss("margin"))

    def draws(self, rows: Rows, stream: str) -> Draws:
        """Keyed randomness of the rows' present turn."""
        return self.setting.draws({"identity": rows["identity"]}, stream, rows["t"])

    def left(self, rows: Rows) -> Tensor:
        """(b,) points that the rows may still ask."""
        return self.steps - rows["spent"]

    def ball(self, rows: Rows) -> Threat:
        """The threat of the rows."""
        return self.setting.threat.with_eps(rows["eps"]) if "eps" in rows else self.setting.threat


class ProbingRule(ScoreRule):
    """CHECK asks about `at`; PROBE asks pairs of points around it, in parts; then `ascend` moves `at` along the slope.

    The last point of the budget is a check: a part that would leave nothing for it is cut short (LAST).

    Attributes:
        stream: names the directions' randomness.
    """

    stream: ClassVar[str] = "probe"

    def __init__(self, setting: Setting, queries: int, samples: int, sigma: float) -> None:
        super().__init__(setting, queries)
        pairs = max(1, min(samples, queries // _SHARE) // 2)
        count = max(-(-pairs // _MOST), 1)
        self.parts = [pairs // count + (j < pairs % count) for j in range(count)]
        self.width, self.sigma = 2 * self.parts[0], sigma

    def start(self, state: State) -> State:
        """See `PhasedRule.start`; what the model says about the clean point is known."""
        x, own = state["x"], super().start(state)
        own |= {"at": x.clone(), "slope": torch.zeros_like(x)}
        own["phase"] = self._following(torch.full_like(own["t"], self.steps), 0)
        return own

    def directions(self, rows: Rows, count: int) -> Tensor:
        """(b, count, C, H, W) keyed random directions."""
        raise TypeError(f"{type(self).__name__} has no directions")

    def ascend(self, rows: Rows, slope: Tensor) -> State:
        """`at` after a step along the slope (b, C, H, W), of any length, and what changes with it."""
        raise TypeError(f"{type(self).__name__} does not ascend")

    def checked(self, rows: Rows, loss: Tensor) -> State:
        """What changes with the loss (b,) at `at`."""
        return {}

    def around(self, rows: Rows, moves: Tensor) -> Tensor:
        """Points at `moves` (b, k, C, H, W) from `at`."""
        return rows["at"][:, None] + moves

    def between(self, rows: Rows, points: Tensor) -> Tensor:
        """(b, k, C, H, W) directions, over sigma, of the pairs that were asked, as the box has left them."""
        plus, minus = points.chunk(2, 1)
        return (plus - minus) / (2 * self.sigma)

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == CHECK:
            return self.around(rows, torch.zeros_like(rows["at"])[:, None])
        pairs = phase - LAST if phase >= LAST else self.parts[phase - PROBE]
        moves = self.sigma * self.directions(rows, pairs)
        return self.around(rows, torch.cat((moves, -moves), 1))

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        assert heard.loss is not None
        left = self.left(rows)
        if phase == CHECK:
            return self.checked(rows, heard.loss[:, 0]) | {"phase": self._following(left, 0)}
        plus, minus = (heard.loss * heard.asked).nan_to_num(0.0).chunk(2, 1)
        between = self.between(rows, points)
        weight = (plus - minus).view(*plus.shape, *[1] * (between.dim() - 2))
        slope = rows["slope"] + (weight * between).sum(1)
        if "mask" in rows:
            slope = slope * rows["mask"]
        part = phase - PROBE + 1
        following = torch.full_like(left, self.DONE)
        if phase < LAST and part < len(self.parts):
            following = self._following(left, part)
        over = following == self.DONE
        new: State = {"slope": choose(over, torch.zeros_like(slope), slope)}
        if bool(over.any()):
            for name, value in self.ascend(rows, slope).items():
                new[name] = choose(over, value, rows[name])
        return new | {"phase": torch.where(over, CHECK, following)}

    def _following(self, left: Tensor, part: int) -> Tensor:
        """(b,) the phase of the next part; DONE where the budget has no pair left beside the check."""
        room = torch.div(left - 1, 2, rounding_mode="floor")
        short = torch.where(room > 0, LAST + room, self.DONE)
        return torch.where(room >= self.parts[part], PROBE + part, short)


def radii(rule: PhasedRule, rows: Rows) -> Tensor:
    """(b,) eps of the rows."""
    x = rows["x"]
    eps = rows["eps"] if "eps" in rows else torch.as_tensor(rule.setting.threat.eps)
    return eps.to(x).expand(len(x))


def inside(rule: PhasedRule, rows: Rows, points: Tensor) -> Tensor:
    """Points (b, k, C, H, W) projected on each row's ball and the box."""
    count = points.shape[1]
    ball = rule.setting.threat.with_eps(radii(rule, rows).repeat_interleave(count, 0))
    centre = rows["x"].repeat_interleave(count, 0)
    return ball.project(points.flatten(0, 1), centre, rule.setting.bounds).view_as(points)


def step_sizes(rule: PhasedRule, state: State, size: float | None, share: float) -> Tensor:
    """(B,) step sizes: the given one, or a share of each row's eps."""
    if size is None:
        return rule.setting.eps(state).flatten() * share
    return torch.full((len(state["x"]),), size, device=state["x"].device)


@dataclass(frozen=True, kw_only=True)
class ScoreAttack(BudgetedAttack):
    """What score-based attacks have in common: a budget of queries.

    Attributes:
        queries: the most queries per sample, beside the one for the clean point.
    """

    knowledge: ClassVar[Knowledge] = "score"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    queries: int = 10_000

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """The method's rule with this attack's fields, for samples of a shape (C, H, W)."""
        raise TypeError(f"{type(self).__name__} has no rule")

    def build(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `BudgetedAttack.build`."""
        return self.rule(setting, shape)

    def positive(self, *names: str) -> None:
        """Raises one line where one of these fields is neither None nor positive."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise RobustError(f"{name}={value} must be positive")
