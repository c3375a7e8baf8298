"""Fast adaptive boundary attack: minimum-norm points by projections on linearised boundaries (arXiv:1907.02044)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, choose, column
from robust.attacks.targets import ranked_targets
from robust.attacks.trial import Trial
from robust.attacks.whitebox.deepfool import nearest_boundary
from robust.classifier import misclassified
from robust.errors import RobustError

_FEW, _MANY = 0.25, 1 / 3  # adversarial among fresh iterates: where sharing begins again, and where it ends


class FABRule(Rule):
    """Section 3 of Croce & Hein 2020 (arXiv:1907.02044).

    Per step: linearise the decision boundary at the iterate, project both the iterate and the clean point on it
    (inside the box), mix the two projections with a bias towards the clean point, and overshoot by η. An iterate that
    is adversarial is moved back towards the clean point by β.

    Check and gradient share one pass while few iterates are adversarial; a gradient taken where one is goes to waste.
    Where more than a third are (0.6 on the models of experiments/verdicts), a check without gradient comes first.
    """

    feasible = False

    def __init__(
        self, setting: Setting, steps: int, alpha_max: float, eta: float, beta: float, restart_at: int = 0
    ) -> None:
        super().__init__(setting)
        self.gradients, self.alpha_max, self.eta, self.beta = steps, alpha_max, eta, beta
        self.steps = steps + 1
        self.restart_at = restart_at
        self.sharing, self.checking = True, False

    def start(self, state: State) -> State:
        """The clean point first; later restarts from random points within half the radius."""
        x, own = state["x"], super().start(state)
        again = (state["identity"] & ((1 << 20) - 1)) >= self.restart_at
        own["at"] = x.clone()
        if bool(again.any()):
            ball = self.setting.ball(state)
            half = ball.with_eps(ball.eps / 2)
            begin = half.random(x, self.setting.bounds, self.setting.draws(state, "fab"))
            own["at"] = choose(again, begin, x)
        own["checked"] = torch.zeros_like(state["hit"])
        return own

    def query(self, state: State) -> Query:
        """Differences of logits and their gradients, against the target or every other class; logits for a check."""
        if self.checking or self.ending(state):
            return Query(state["at"], "logits")
        return Query(state["at"], "difference_grad", against=self._against(state))

    def _against(self, state: State) -> Tensor:
        if "target" in state:
            return state["target"][:, None]
        others = torch.arange(self.setting.classes - 1, device=state["y"].device).expand(len(state["y"]), -1)
        return others + (others >= state["y"][:, None])

    def step(self, state: State, answer: Answer) -> State:
        """Back towards the clean point where the iterate is adversarial, else over the nearest boundary."""
        t, at, x = state["t"], state["at"], state["x"]
        hit = misclassified(answer.scores, state["y"], state["target"] if self.setting.targeted else None)
        fresh = ~state["checked"] & (t > 0)
        back = hit & fresh
        self._learn(back, fresh)
        retreat = x + (at - x) * self.beta
        if answer.gradient is None:
            self.checking = False
            last = t >= self.gradients
            return {"at": choose(back, retreat, at), "checked": torch.ones_like(hit), "t": t + last}
        self.checking = not self.sharing
        over = choose(back, retreat, self._over(state, answer))
        return {"at": over, "checked": back, "t": torch.where(back, t, t + 1)}

    def _learn(self, back: Tensor, fresh: Tensor) -> None:
        """Whether check and gradient go on to share a pass; on a GPU, where looking costs time, they do not."""
        if back.device.type != "cpu":
            self.sharing = False
        elif bool(fresh.any()):
            share = float(back.sum() / fresh.sum())
            self.sharing = share < (_FEW if not self.sharing else _MANY)

    def _over(self, state: State, answer: Answer) -> Tensor:
        """The biased, overshot projection on the nearest linearised boundary."""
        ball, bounds = self.setting.ball(state), self.setting.bounds
        x, at = state["x"], state["at"]
        gap, normal = nearest_boundary(self.setting.threat, answer)
        offset = -gap  # ⟨normal, d⟩ that brings z_class − z_y to zero
        to_clean = offset + (normal * (at - x)).flatten(1).sum(1)
        from_at = ball.to_hyperplane(at, normal, offset, bounds)
        from_x = ball.to_hyperplane(x, normal, to_clean, bounds)
        near, far = (ball.length(part).float().clamp_min(1e-8) for part in (from_at, from_x))
        alpha = column((near / (near + far)).clamp(0, self.alpha_max), x)
        mixed = torch.lerp(at.add(from_at, alpha=self.eta), x.add(from_x, alpha=self.eta), alpha)
        return mixed.clamp_(*bounds)


@dataclass(frozen=True, kw_only=True)
class FAB(Attack):
    """Fast adaptive boundary attack (Croce & Hein 2020, arXiv:1907.02044): the smallest perturbation, any class.

    Each step takes one backward pass per other class; `fab-t` takes one.

    Attributes:
        steps: steps per start.
        restarts: starts; the first is the clean point.
        alpha_max: largest weight of the clean point's projection.
        eta: overshoot.
        beta: how far an adversarial iterate stays from the clean point.
    """

    minimum_norm: ClassVar[bool] = True
    until: Until = "smallest"
    steps: int = 100
    restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or self.restarts < 1:
            raise RobustError(f"steps={self.steps}, restarts={self.restarts}: each at least 1")
        if self.restarts > 1 and not self.threat.bounded:
            raise RobustError("restarts start within eps; give a finite eps or restarts=1")
        aims = self.aims(trial)
        once = 1 if aims is None else len(aims)
        rule = FABRule(setting_of(trial), self.steps, self.alpha_max, self.eta, self.beta, once)
        run_rule(rule, trial, make_jobs(trial, self.restarts, aims))

    def aims(self, trial: Trial) -> Tensor | None:
        """(T, N) classes whose boundaries are followed, or None for the nearest of all."""
        return None


@dataclass(frozen=True, kw_only=True)
class FABT(FAB):
    """Targeted FAB (Croce & Hein 2020, arXiv:2003.01690, sec. 4): one run per runner-up class, one gradient a step.

    Attributes:
        n_targets: the most likely wrong classes that are tried, at most classes − 1.
    """

    n_targets: int = 9

    def aims(self, trial: Trial) -> Tensor | None:
        """The runner-up classes, or the one target that was asked for."""
        if self.n_targets < 1:
            raise RobustError(f"n_targets={self.n_targets} aims at nothing; give at least 1")
        return None if trial.targets is not None else ranked_targets(trial, self.n_targets)
