"""The inner maximisation of TRADES as an attack (Zhang et al. 2019, arXiv:1901.08573)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robust.attacks.engine import setting_of
from robust.attacks.query import Answer
from robust.attacks.rule import Setting, State, choose
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.walks import Walk
from robust.losses import cross_entropy, kl, margin

_NEAR = 0.001  # standard deviation of the start: at the clean point itself the divergence has no gradient


class NearStart(GradientSteps):
    """Gradient steps from x + 0.001 · N(0, I)."""

    def start(self, state: State) -> State:
        """The clean point with a little keyed noise, in ball ∩ box."""
        x, own = state["x"], super().start(state)
        noise = self.setting.draws(state, "start").normal(*x.shape[1:]).to(x)
        own["at"] = self.setting.ball(state).project(x + _NEAR * noise, x, self.setting.bounds)
        return own


class DivergenceSteps(NearStart):
    """The same on KL(p(clean) ‖ p(x)), p(clean) being what the first query says.

    It is asked in the batch that the other points are asked in: so close to the clean point the divergence sees the
    rounding that another batch brings. The divergence rises on both sides of the clean point, by the same to second
    order; the side of the first step is the one on which y loses. The noise is as likely on either side.

    Where `known`, as in trainings, p(clean) is what the trial says, and that query is spared.
    """

    def __init__(self, setting: Setting, schedule: Schedule, known: bool = False) -> None:
        super().__init__(setting, schedule, kl, reference=True)
        self.first = 0 if known else 1
        self.steps = schedule.steps + 1 + self.first

    def start(self, state: State) -> State:
        """The clean point; the noisy one comes next."""
        own = super().start(state)
        return {**own, "at": state["x"].clone(), "near": own["at"]} if self.first else own

    def step(self, state: State, answer: Answer) -> State:
        """To the noisy point, then projected steps of the rows that have steps left."""
        t, at, x, y = state["t"], state["at"], state["x"], state["y"]
        changed: State = {"t": t + 1}
        if answer.gradient is None:
            return changed
        reference = choose(t < self.first, answer.scores, state["reference"])
        mirror = (t == self.first) & (margin(answer.scores, y) < margin(reference, y))
        origin = choose(mirror, 2 * x - at, at)
        gradient = choose(mirror, -answer.gradient, answer.gradient)
        ball, bounds = self.setting.ball(state), self.setting.bounds
        moved = ball.step(origin, gradient, self._size(state), x, bounds)
        moved = choose(t < self.first + self.schedule.steps, moved, at)
        if self.first:
            moved = choose(t == 0, state["near"], moved)
        return {**changed, "at": moved, "reference": reference}


@dataclass(frozen=True, kw_only=True)
class TPGD(Walk):
    """TRADES' inner maximiser (Zhang et al. 2019, arXiv:1901.08573): PGD on KL(p(clean) ‖ p(x)), not on the label.

    The label only settles on which side of the clean point the search begins. Towards a target class the target's
    one-hot takes the place of p(clean), and the divergence, which then is the cross-entropy, is lowered.

    Attributes:
        steps: gradients, beside one pass for the clean point.
        step_size: in the unit of x; None for 2.5 · eps / steps (the paper's 0.007 for 0.031 and 10 steps is 2.3).
    """

    steps: int = 10
    step_size: float | None = None

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        return Schedule(self.steps, 2.5 / max(self.steps, 1), self.step_size)

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        if trial.targets is not None:
            return NearStart(setting_of(trial), self.schedule(), cross_entropy)
        return DivergenceSteps(setting_of(trial), self.schedule(), known=trial.bare)

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`."""
        return super().passes(**chosen) + 3
