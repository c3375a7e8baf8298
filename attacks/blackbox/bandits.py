"""Bandits with time and data priors (Ilyas et al. 2019, arXiv:1807.07978)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.blackbox.score import CHECK, PROBE, ScoreAttack, ScoreRule, step_sizes
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import Setting, State, column

_RATE, _STEP = (1.0, 2.0), (0.2, 0.1)  # in l2 and in linf; the steps of eps
_MOST, _DECAY = 1 - 1e-6, 0.9


class BanditsRule(ScoreRule):
    """Algorithms 2 and 3 of the paper: a prior of the gradient, kept on a coarse grid, learns from two points a step.

    PROBE asks around `at` along the prior ± exploration. The paper does not count its looks at the iterate; here CHECK
    asks about it only where a point beside it is adversarial, and at the end of the budget. What two points say is
    divided by its running root mean square, so that rates do not depend on the scale of the scores.
    """

    def __init__(self, setting: Setting, queries: int, shape: tuple[int, ...], attack: Bandits) -> None:
        super().__init__(setting, queries)
        self.width, self.attack = 2, attack
        self.shape = (shape[0], *(max(math.ceil(side / attack.tile), 1) for side in shape[1:]))
        linf = setting.threat.norm == "linf"
        self.rate = attack.rate if attack.rate is not None else _RATE[linf]
        self.multiplicative = linf

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        own |= {"at": x.clone(), "prior": x.new_zeros(len(x), *self.shape)}
        own |= {"power": x.new_zeros(len(x)), "weight": x.new_zeros(len(x))}
        own |= {"size": step_sizes(self, state, self.attack.step_size, _STEP[self.multiplicative])}
        return own | {"phase": torch.full_like(own["t"], PROBE if self.steps > 2 else CHECK)}

    def _whole(self, prior: Tensor, rows: Rows) -> Tensor:
        """(b, C, H, W) the prior's cells as tiles of the image."""
        return F.interpolate(prior, size=rows["x"].shape[2:], mode="nearest-exact")

    def _noise(self, rows: Rows) -> Tensor:
        draws = self.draws(rows, "bandits").normal(*self.shape).to(rows["x"])
        return self.attack.exploration * draws / math.sqrt(math.prod(self.shape))

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == CHECK:
            return rows["at"][:, None]
        noise = self._noise(rows)
        sides = []
        for prior in (rows["prior"] + noise, rows["prior"] - noise):
            whole = self._whole(prior, rows)
            length = whole.flatten(1).norm(dim=1).clamp_min(1e-12)
            sides.append(rows["at"] + self.attack.sigma * whole / column(length, whole))
        return torch.stack(sides, 1)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        left = self.left(rows)
        if phase == CHECK:
            return {"phase": torch.where(left > 2, PROBE, self.DONE)}
        assert heard.loss is not None
        loss = heard.loss.nan_to_num(0.0)
        slope = loss[:, 0] - loss[:, 1]
        power = _DECAY * rows["power"] + (1 - _DECAY) * slope.square()
        weight = _DECAY * rows["weight"] + 1 - _DECAY
        slope = slope / (power / weight).sqrt().clamp_min(1e-12)
        noise = self._noise(rows)
        prior = self._learned(rows["prior"], column(slope, noise) * noise)
        ball, x = self.ball(rows), rows["x"]
        whole = self._whole(prior, rows)
        check = heard.hit.any(1) | (left <= 2)
        return {
            "prior": prior,
            "power": power,
            "weight": weight,
            "at": ball.step(rows["at"], whole, rows["size"], x, self.setting.bounds),
            "phase": torch.where(check, CHECK, PROBE),
        }

    def _learned(self, prior: Tensor, gradient: Tensor) -> Tensor:
        """The prior after a step: exponentiated gradients between −1 and 1 where signs count, else a plain one."""
        if not self.multiplicative:
            return prior + self.rate * gradient
        return torch.tanh(torch.atanh(prior.clamp(-_MOST, _MOST)) + self.rate * gradient)


@dataclass(frozen=True, kw_only=True)
class Bandits(ScoreAttack):
    """Bandits-TD (Ilyas et al. 2019, arXiv:1807.07978): a gradient prior in time and space, two points a step.

    Attributes:
        tile: side of the prior's tiles in pixels; the paper's 50 × 50 prior on ImageNet has tiles of 4 to 6.
        rate: learning rate of the prior, for slopes whose mean square is one; None for 2 in linf and 1 in l2. The
            paper's 100 and 0.1 are for the slopes of its ImageNet models.
        exploration: length of the noise around the prior, 1 as in the paper's linf.
        sigma: l2 distance of the points from the iterate, 0.1 as in the paper's linf.
        step_size: length of a step in the threat's norm; None for eps / 10 in linf and eps / 5 in l2.
    """

    tile: int = 2
    rate: float | None = None
    exploration: float = 1.0
    sigma: float = 0.1
    step_size: float | None = None

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `ScoreAttack.rule`."""
        self.positive("tile", "rate", "exploration", "sigma", "step_size")
        return BanditsRule(setting, self.queries, shape, self)
