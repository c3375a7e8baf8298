"""DeepFool: steps to the nearest linearised decision boundary until it is crossed (arXiv:1511.04599)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State
from robust.attacks.trial import Trial
from robust.classifier import misclassified
from robust.errors import RobustError
from robust.losses import get as get_loss
from robust.threat import Threat


class DeepFoolRule(Rule):
    """Algorithm 2 of Moosavi-Dezfooli et al. 2016 (arXiv:1511.04599), in the threat's norm.

    Turns alternate: one takes the gradients, the next checks where the step led, so that no gradient is taken of a
    point that has crossed. A row whose point is adversarial, and outside the threat or confirmed, is over.
    """

    feasible = False

    def __init__(self, setting: Setting, steps: int, overshoot: float, candidates: int) -> None:
        super().__init__(setting)
        self.steps, self.overshoot = steps, overshoot
        self.others = min(candidates, setting.classes) - 1
        self.passes = 2 + 2 * (1 if setting.targeted else self.others)
        self.needs_reference = not setting.targeted
        self.checking = False

    def start(self, state: State) -> State:
        """The clean point, and the classes whose boundaries count: the likeliest wrong ones."""
        x, own = state["x"], super().start(state)
        own["at"], own["walked"] = x.clone(), torch.zeros_like(x)
        own["moved"], own["over"] = torch.zeros_like(state["hit"]), torch.zeros_like(state["hit"])
        if not self.setting.targeted:
            own["against"] = likeliest(state["reference"], state["y"], self.others)
        return own

    def query(self, state: State) -> Query:
        """A check, or the boundaries' values and normals: of the candidates, or towards the one target."""
        if self.checking:
            return Query(state["at"], "logits")
        return boundaries(state["at"], state.get("against"))

    def step(self, state: State, answer: Answer) -> State:
        """After gradients over the nearest boundary; after a check the end of what is adversarial."""
        self.checking = answer.gradient is not None
        if answer.gradient is None:
            over = self.crossed(state, answer.scores) & state["moved"]
            return {"over": over, "t": state["t"] + state["moved"]}
        walked = state["walked"] + self.nearest(state, state["at"], answer)
        at = (state["x"] + (1 + self.overshoot) * walked).clamp(*self.setting.bounds)
        return {"walked": walked, "at": at, "moved": torch.ones_like(state["moved"])}

    def crossed(self, state: State, scores: Tensor) -> Tensor:
        """(B,) rows whose point is adversarial; inside the threat only if the engine, too, has called it so."""
        hit = misclassified(scores, state["y"], state["target"] if self.setting.targeted else None)
        inside = self.setting.ball(state).inside(state["at"], state["x"], self.setting.bounds)
        return hit & (state["hit"] | ~inside)

    def nearest(self, state: State, at: Tensor, answer: Answer) -> Tensor:
        """The shortest step from `at` onto the nearest linearised boundary, inside the box."""
        ball = self.setting.ball(state)
        gap, normal = nearest_boundary(ball, answer)
        return ball.to_hyperplane(at, normal, gap.abs(), self.setting.bounds)

    def done(self, state: State) -> Tensor:
        """Rows that have crossed, or have no step left."""
        return state["over"] | (state["t"] >= self.steps)


def likeliest(scores: Tensor, y: Tensor, count: int) -> Tensor:
    """(B, count) the wrong classes with the largest scores, the largest first."""
    return scores.nan_to_num(0.0).scatter(1, y[:, None], -torch.inf).topk(count, dim=1).indices


def boundaries(at: Tensor, against: Tensor | None) -> Query:
    """Asks for the decision function of every class of `against` (B, T), or of the one target, and its gradient."""
    if against is None:
        return Query(at, "loss_grad", loss=get_loss("margin"))
    return Query(at, "difference_grad", against=against)


def nearest_boundary(ball: Threat, answer: Answer) -> tuple[Tensor, Tensor]:
    """(B,) value and (B, C, H, W) gradient of the decision function whose linearised zero is nearest."""
    assert answer.loss is not None
    assert answer.gradient is not None
    values, gradients = answer.loss, answer.gradient
    if values.dim() == 1:
        return values, gradients
    slopes = torch.stack([ball.dual(gradients[:, k]) for k in range(values.shape[1])], dim=1)
    best = (values.abs() / slopes.clamp_min(1e-12)).argmin(1)
    rows = torch.arange(len(best), device=best.device)
    return values[rows, best], gradients[rows, best]


@dataclass(frozen=True, kw_only=True)
class DeepFool(Attack):
    """DeepFool (Moosavi-Dezfooli et al. 2016, arXiv:1511.04599): over the nearest linearised boundary, minimum norm.

    A sample is over at its first adversarial point. Departures from the paper: steps stay in the box (they are the
    paper's where the box is far); the overshoot is part of every iterate, as in the authors' code. With a target the
    one boundary between it and its strongest rival is followed.

    Attributes:
        steps: the most steps per sample; few are needed.
        overshoot: η; the whole walk is lengthened by this fraction, at least 0.
        candidates: the likeliest classes that are looked at, the sample's own among them, at least 2.
    """

    minimum_norm: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2")
    until: Until = "smallest"
    steps: int = 50
    overshoot: float = 0.02
    candidates: int = 10

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or self.candidates < 2 or not self.overshoot >= 0:
            raise RobustError(
                f"steps={self.steps}, candidates={self.candidates}, overshoot={self.overshoot}: "
                "at least 1, 2 and 0"
            )
        rule = DeepFoolRule(setting_of(trial), self.steps, self.overshoot, self.candidates)
        run_rule(rule, trial, make_jobs(trial))

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`; a step takes a gradient per candidate and a check."""
        candidates = chosen.get("candidates", cls.candidates)
        return float(chosen.get("steps", cls.steps) * 2 * candidates)
