"""Variance tuning of momentum methods (Wang & He 2021, arXiv:2103.15571)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust.attacks.query import Answer
from robust.attacks.rule import Setting, State
from robust.attacks.several import spread
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.transfer import TransferAttack, TransferSteps
from robust.errors import RobustError
from robust.losses import Loss


class VarianceSteps(TransferSteps):
    """Algorithm 1: g ← μ g + (∇J(x) + v) / ‖∇J(x) + v‖₁, then v ← mean of ∇J at N neighbours of x, less ∇J(x)."""

    apart = False
    steady = True

    def __init__(
        self,
        setting: Setting,
        schedule: Schedule,
        loss: Loss,
        reference: bool,
        neighbours: int,
        beta: float,
    ) -> None:
        super().__init__(setting, schedule, loss, reference, neighbours + 1)
        self.neighbours, self.beta = neighbours, beta

    def start(self, state: State) -> State:
        """No variance yet."""
        own = super().start(state)
        own["variance"] = torch.zeros_like(state["x"])
        return own

    def points(self, state: State) -> Tensor:
        """The point of the gradient, and the iterate's neighbours within β · eps."""
        many, first = self.neighbours, self._first(state)
        at, ball = spread(state["at"], many), self.setting.threat
        if "eps" in state:
            ball = ball.with_eps(spread(state["eps"], many))
        number = torch.arange(len(at), device=at.device) % many
        draws = self.setting.draws(
            {"identity": spread(state["identity"], many)},
            "neighbours",
            spread(state["t"], many) * many + number,
        )
        around = ball.with_eps(ball.eps * self.beta).random(at, self.setting.bounds, draws)
        return torch.cat((first[:, None], around.unflatten(0, (-1, many))), 1).flatten(0, 1)

    def _first(self, state: State) -> Tensor:
        at: Tensor = state["at"]
        return at

    def combine(self, state: State, gradient: Tensor) -> Tensor:
        """The tuned gradient."""
        return gradient[:: self.neighbours + 1] + state["variance"]

    def step(self, state: State, answer: Answer) -> State:
        """A step, and the variance for the next one."""
        changed = super().step(state, answer)
        if answer.gradient is not None:
            each = answer.gradient.unflatten(0, (-1, self.neighbours + 1))
            changed["variance"] = each[:, 1:].mean(1) - each[:, 0]
        return changed


class VarianceLookahead(VarianceSteps):
    """The same with ∇J at Nesterov's lookahead; the neighbours stay those of the iterate."""

    apart = True
    steady = False

    def _first(self, state: State) -> Tensor:
        return self.ahead(state)


@dataclass(frozen=True, kw_only=True)
class VMIFGSM(TransferAttack):
    """VMI-FGSM (Wang & He 2021, arXiv:2103.15571): MI-FGSM with gradients tuned by their variance around the iterate.

    The neighbours are uniform in the threat's ball of radius β · eps, as in the paper in linf, and cut to the box.

    Attributes:
        steps: gradient steps.
        step_size: in the unit of x; None for eps / steps.
        decay: the momentum's factor μ, at least 0.
        neighbours: how many N, one gradient each per step, at least 1.
        beta: the neighbourhood's radius β in units of eps, positive.
        loss: a name of `robust.losses`.
    """

    neighbours: int = 20
    beta: float = 1.5

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        return VarianceSteps(*self.steps_of(trial), *self._around())

    def _around(self) -> tuple[int, float]:
        if self.neighbours < 1 or not self.beta > 0:
            raise RobustError(f"neighbours={self.neighbours}, beta={self.beta}: at least 1, and positive")
        return self.neighbours, self.beta

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """A gradient for the iterate and each neighbour, per step."""
        neighbours: int = chosen.get("neighbours", cls.neighbours)
        return super().passes(**chosen) * (3 * neighbours + 3) / 4


@dataclass(frozen=True, kw_only=True)
class VNIFGSM(VMIFGSM):
    """VNI-FGSM (Wang & He 2021, arXiv:2103.15571): NI-FGSM with gradients tuned by their variance around the iterate.

    As in the authors' code the gradient is taken at the lookahead (see `NIFGSM`), its neighbours around the iterate.
    """

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        return VarianceLookahead(*self.steps_of(trial), *self._around())
