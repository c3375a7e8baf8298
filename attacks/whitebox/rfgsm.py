"""R+FGSM: a random step before the gradient's (Tramèr et al. 2018, arXiv:1705.07204)."""

from __future__ import annotations

from dataclasses import dataclass

from robust.attacks.engine import setting_of
from robust.attacks.rule import Setting, State
from robust.attacks.trial import Trial
from robust.attacks.whitebox.steps import GradientSteps, Schedule
from robust.attacks.whitebox.walks import Walk
from robust.errors import RobustError
from robust.losses import Loss
from robust.losses import get as get_loss


class RandomStepFirst(GradientSteps):
    """Gradient steps that begin where a step along Gaussian noise ends: its signs in linf."""

    def __init__(
        self, setting: Setting, schedule: Schedule, loss: Loss, reference: bool, alpha: float
    ) -> None:
        super().__init__(setting, schedule, loss, reference)
        self.alpha = alpha

    def start(self, state: State) -> State:
        """x + α · steepest(N(0, I)), in ball ∩ box."""
        x, own = state["x"], super().start(state)
        noise = self.setting.draws(state, "start").normal(*x.shape[1:]).to(x)
        size = self.setting.eps(state).flatten() * self.alpha
        own["at"] = self.setting.ball(state).step(x, noise, size, x, self.setting.bounds)
        return own


@dataclass(frozen=True, kw_only=True)
class RFGSM(Walk):
    """R+FGSM (Tramèr et al. 2018, arXiv:1705.07204): a random step of α · eps, then the rest of eps along the gradient.

    The paper's norm is linf, where both steps follow signs; in l2 and l1 they follow the threat's steepest direction.

    Attributes:
        alpha: the random step as a fraction of eps, in (0, 1); the paper takes a half.
        loss: a name of `robust.losses`.
    """

    alpha: float = 0.5
    loss: str = "cross-entropy"

    def schedule(self) -> Schedule:
        """See `Walk.schedule`."""
        if not 0 < self.alpha < 1:
            raise RobustError(f"alpha={self.alpha} is a fraction of eps; give a number between 0 and 1")
        return Schedule(steps=1, relative_step=1 - self.alpha)

    def rule(self, trial: Trial) -> GradientSteps:
        """See `Walk.rule`."""
        loss = get_loss(self.loss)
        return RandomStepFirst(setting_of(trial), self.schedule(), loss, self.loss == "kl", self.alpha)
