"""SparseFool: few pixels by l1 steps to DeepFool's linearised boundary (Modas et al. 2019, arXiv:1811.02248)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, choose
from robust.attacks.trial import Trial
from robust.attacks.whitebox.deepfool import boundaries, likeliest, nearest_boundary
from robust.classifier import misclassified
from robust.errors import RobustError
from robust.threat import L1, L2


@dataclass(frozen=True)
class Search:
    """SparseFool's hyper-parameters; see `SparseFool`."""

    steps: int
    inner: int
    reach: float
    overshoot: float
    candidates: int


class SparseFoolRule(Rule):
    """Algorithm 2 of the paper; each row is at its own step, and at its own place in the DeepFool search within it.

    A row looks for the boundary near its iterate with DeepFool: l2 steps to the nearest linearised boundary. Where it
    is crossed, it takes the normal w, and goes from the iterate by the l1-shortest step inside the box (algorithm 1:
    the steepest coordinates first, each to the box's edge) to the hyperplane with normal w through the point `reach`
    times as far. It ends at its first adversarial iterate.
    """

    feasible = False

    def __init__(self, setting: Setting, search: Search) -> None:
        super().__init__(setting)
        self.search = search
        self.steps = search.steps * (search.inner + 1) + 1
        self.others = min(search.candidates, setting.classes) - 1
        self.passes = 1 + 2 * (1 if setting.targeted else self.others)
        self.needs_reference = not setting.targeted

    def start(self, state: State) -> State:
        """The clean point, and the classes whose boundaries count: the likeliest wrong ones."""
        x, own = state["x"], super().start(state)
        own["at"], own["iterate"], own["walked"] = x.clone(), x.clone(), torch.zeros_like(x)
        own["round"], own["deep"] = torch.zeros_like(own["t"]), torch.zeros_like(own["t"])
        own["over"] = torch.zeros_like(state["hit"])
        if not self.setting.targeted:
            own["against"] = likeliest(state["reference"], state["y"], self.others)
        return own

    def query(self, state: State) -> Query:
        """The boundaries' values and normals, at iterates and at the points of the searches from them."""
        return boundaries(state["at"], state.get("against"))

    def step(self, state: State, answer: Answer) -> State:
        """Goes on with DeepFool, or takes the l1 step where it has crossed; an adversarial iterate ends its row."""
        aimed = state["target"] if self.setting.targeted else None
        hit = misclassified(answer.scores, state["y"], aimed)
        deep, iterate = state["deep"], state["iterate"]
        crossed = (deep > 0) & (hit | (deep >= self.search.inner))
        iterate = choose(crossed, self._sparse(state, answer), iterate)
        walked = choose(crossed, torch.zeros_like(iterate), state["walked"] + self._deeper(state, answer))
        at = (iterate + (1 + self.search.overshoot) * walked).clamp(*self.setting.bounds)
        return {
            "t": state["t"] + 1,
            "at": at,
            "iterate": iterate,
            "walked": walked,
            "deep": torch.where(crossed, 0, deep + 1),
            "round": state["round"] + crossed,
            "over": (deep == 0) & (hit | (state["round"] >= self.search.steps)),
        }

    def _deeper(self, state: State, answer: Answer) -> Tensor:
        """DeepFool's step from the row's point."""
        gap, normal = nearest_boundary(L2(), answer)
        return L2().to_hyperplane(state["at"], normal, gap.abs(), self.setting.bounds)

    def _sparse(self, state: State, answer: Answer) -> Tensor:
        """The next iterate, by the boundary of the class that is reached."""
        normal = _reached(answer)
        gap = self.search.reach * (normal * state["walked"]).flatten(1).sum(1)
        step = L1().to_hyperplane(state["iterate"], normal, gap, self.setting.bounds)
        moved = state["iterate"] + (1 + self.search.overshoot) * step
        return moved.clamp(*self.setting.bounds)

    def done(self, state: State) -> Tensor:
        """Rows that have succeeded, or have no step left."""
        return state["over"] | super().done(state)


def _reached(answer: Answer) -> Tensor:
    """(B, C, H, W) gradient of the decision function that is largest."""
    assert answer.loss is not None
    assert answer.gradient is not None
    if answer.loss.dim() == 1:
        return answer.gradient
    rows = torch.arange(len(answer.loss), device=answer.loss.device)
    return answer.gradient[rows, answer.loss.argmax(1)]


@dataclass(frozen=True, kw_only=True)
class SparseFool(Attack):
    """SparseFool (Modas et al. 2019, arXiv:1811.02248): l1 steps to linearised boundaries that change few pixels.

    A sample is over at its first adversarial iterate. Defaults are those of the authors' code. It works on
    coordinates; distances count pixels. Departures: the DeepFool search within stays in the box, as the points that are
    asked; and with a target, which the paper does not have, the one boundary to the target's strongest rival is
    followed.

    Attributes:
        steps: l1 steps.
        inner: steps of each DeepFool search at most.
        reach: λ ≥ 1; how far the hyperplane is moved, in units of the way to the boundary. Larger takes fewer steps
            and more pixels.
        overshoot: the fraction that steps are lengthened by, at least 0.
        candidates: the likeliest classes that are looked at, the sample's own among them, at least 2.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    minimum_norm: ClassVar[bool] = True
    until: Until = "smallest"
    steps: int = 20
    inner: int = 50
    reach: float = 3.0
    overshoot: float = 0.02
    candidates: int = 10

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or self.inner < 1 or self.candidates < 2:
            raise RobustError(
                f"steps={self.steps}, inner={self.inner}, candidates={self.candidates}: at least 1, 1 and 2"
            )
        if not self.reach >= 1 or not self.overshoot >= 0:
            raise RobustError(f"reach={self.reach}, overshoot={self.overshoot}: at least 1, and not negative")
        search = Search(self.steps, self.inner, self.reach, self.overshoot, self.candidates)
        run_rule(SparseFoolRule(setting_of(trial), search), trial, make_jobs(trial))

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`: some four points a step, and at each a gradient per rival class."""
        steps, rivals = chosen.get("steps", cls.steps), chosen.get("candidates", cls.candidates) - 1
        return float(4 * steps * (1 + 2 * rivals))
