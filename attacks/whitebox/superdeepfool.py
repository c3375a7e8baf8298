"""SuperDeepFool: DeepFool, then the projection of the way gone on the boundary's normal, in turn (arXiv:2303.12481)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack, Until
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Setting, State, choose, column
from robust.attacks.trial import Trial
from robust.attacks.whitebox.deepfool import DeepFoolRule, boundaries, nearest_boundary
from robust.classifier import misclassified
from robust.errors import RobustError
from robust.threat import L2

_GAIN = 0.005  # of the distance: a crossing that is not so much nearer than the last one ends the walk


class SuperDeepFoolRule(DeepFoolRule):
    """SDF(∞, 1), algorithm 2 of the paper, on the boundaries of DeepFool's candidates.

    A row walks as DeepFool does until it has crossed. Then its perturbation is projected on the normal of the boundary
    that it crossed, there. If that is adversarial, what is left is the smallest point on the line from the clean one,
    found by halving. Else the walk goes on, over the boundary that was crossed first, until crossings come no nearer:
    where the boundary bends away, projections stop short of it for ever.
    """

    def __init__(
        self, setting: Setting, steps: int, overshoot: float, candidates: int, halvings: int
    ) -> None:
        super().__init__(setting, steps, overshoot, candidates)
        self.passes = 1 + 2 * (1 if setting.targeted else self.others)
        self.halvings = halvings

    def start(self, state: State) -> State:
        """See `DeepFoolRule.start`."""
        x, own = state["x"], super().start(state)
        zeros = torch.zeros(len(x), device=x.device)
        own |= {"projected": own["moved"].clone(), "far": x.clone(), "halved": torch.zeros_like(own["t"])}
        return own | {"low": zeros, "high": zeros + 1, "nearest": zeros + torch.inf}

    def query(self, state: State) -> Query:
        """Values and normals of all candidates' boundaries; where every row has crossed once, of the first alone."""
        beyond = bool(state["nearest"].isfinite().all())
        return boundaries(state["at"], None if beyond else state.get("against"))

    def step(self, state: State, answer: Answer) -> State:
        """One step of the walk, a projection, or a halving."""
        x, at = state["x"], state["at"]
        hit = misclassified(answer.scores, state["y"], state["target"] if self.setting.targeted else None)
        halving = state["halved"] > 0
        away = (at - x).flatten(1).norm(dim=1)
        fresh = hit & ~halving
        arrived = fresh & (state["projected"] | (away > (1 - _GAIN) * state["nearest"]))
        crossed = fresh & ~arrived
        gap, normal = self._boundary(state, answer)
        onward = state["walked"] + self.setting.threat.to_hyperplane(
            at, normal, gap.abs(), self.setting.bounds
        )
        walked = choose(crossed, _projected(at - x, normal), choose(hit, state["walked"], onward))
        reach = torch.where(hit, 1.0, 1 + self.overshoot)
        following = (x + column(reach, x) * walked).clamp(*self.setting.bounds)
        middle = (state["low"] + state["high"]) / 2
        low = torch.where(halving & ~hit, middle, state["low"])
        high = torch.where(halving & hit, middle, state["high"])
        far = choose(arrived, at, state["far"])
        return {
            "walked": walked,
            "at": choose(halving | arrived, torch.lerp(x, far, column((low + high) / 2, x)), following),
            "projected": crossed,
            "nearest": torch.where(fresh, away.minimum(state["nearest"]), state["nearest"]),
            "far": far,
            "low": low,
            "high": high,
            "halved": state["halved"] + (halving | arrived),
            "over": state["halved"] >= self.halvings,
            "t": state["t"] + 1,
        }

    def _boundary(self, state: State, answer: Answer) -> tuple[Tensor, Tensor]:
        """Value and normal of the nearest candidate's boundary; after the first crossing of the strongest class's."""
        near = nearest_boundary(self.setting.threat, answer)
        values, gradients = answer.loss, answer.gradient
        assert values is not None
        assert gradients is not None
        if values.dim() == 1:
            return near
        rows, strongest = torch.arange(len(values), device=values.device), values.argmax(1)
        beyond = state["nearest"].isfinite() | misclassified(answer.scores, state["y"])
        gap: Tensor = torch.where(beyond, values[rows, strongest], near[0])
        return gap, choose(beyond, gradients[rows, strongest], near[1])


def _projected(away: Tensor, normal: Tensor) -> Tensor:
    """The perturbations (B, C, H, W) projected on the normals."""
    unit = L2().steepest(normal)
    return column((away * unit).flatten(1).sum(1), away) * unit


@dataclass(frozen=True, kw_only=True)
class SuperDeepFool(Attack):
    """SuperDeepFool (Abdollahpoor et al. 2023, arXiv:2303.12481): DeepFool and projections on the normal, minimum l2.

    As in DeepFool here, steps stay in the box. The last point is drawn to the boundary by bisection.

    Attributes:
        steps: the most gradients per sample, each of all candidates; few are needed.
        overshoot: η of DeepFool's walks, at least 0.
        candidates: the likeliest classes that are looked at, the sample's own among them, at least 2.
        search_steps: halvings at the end; 0 for none.
    """

    minimum_norm: ClassVar[bool] = True
    norms: ClassVar[tuple[str, ...]] = ("l2",)
    until: Until = "smallest"
    steps: int = 100
    overshoot: float = 0.02
    candidates: int = 10
    search_steps: int = 10

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or self.candidates < 2 or not self.overshoot >= 0 or self.search_steps < 0:
            raise RobustError(
                f"steps={self.steps}, candidates={self.candidates}, overshoot={self.overshoot}, "
                f"search_steps={self.search_steps}: at least 1, 2, 0 and 0"
            )
        setting = setting_of(trial)
        rule = SuperDeepFoolRule(setting, self.steps, self.overshoot, self.candidates, self.search_steps)
        run_rule(rule, trial, make_jobs(trial))

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`; a step takes a forward pass and a gradient per candidate."""
        candidates = chosen.get("candidates", cls.candidates)
        return float(chosen.get("steps", cls.steps) * (2 * candidates - 1))
