"""Auto-PGD: step sizes that follow progress (Croce & Hein 2020, arXiv:2003.01690; l1 after arXiv:2103.01208)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State, choose, column
from robust.attacks.targets import ranked_targets
from robust.attacks.trial import Trial
from robust.errors import RobustError
from robust.losses import Loss
from robust.losses import get as get_loss
from robust.rng import JOB_BITS

_MOMENTUM = 0.75  # weight α of the new step against the last one
_RHO = 0.75  # fraction of a window's steps that must raise the loss


class APGDRule(Rule):
    """Algorithm 1 of the paper, one checkpoint schedule per row.

    A row's window starts at 0.22 of the steps and shrinks by 0.03 to 0.06. At its end the step size is halved, and
    the search goes back to its best point, if fewer than ρ of the steps raised the loss, or if neither the step size
    nor the best loss changed since the last window.
    """

    scouted = steady = True

    def __init__(
        self, setting: Setting, steps: int, loss: Loss, copies: int = 1, reference: bool = False
    ) -> None:
        super().__init__(setting)
        self.gradients, self.loss, self.copies, self.needs_reference = steps, loss, copies, reference
        self.steps = steps + 1
        self.first = max(int(0.22 * steps), 1)
        self.shortest = max(int(0.06 * steps), 1)
        self.shrink = max(int(0.03 * steps), 1)

    def start(self, state: State) -> State:
        """A keyed random point of the ball, whose largest displacement reaches its edge."""
        x, own = state["x"], super().start(state)
        ball, bounds = self.setting.ball(state), self.setting.bounds
        begin = ball.random(x, bounds, self.setting.draws(state, "apgd"))
        reach = ball.distance(begin, x).float().clamp_min(1e-12)
        if ball.norm == "linf":
            begin = x + (begin - x) * self.setting.eps(state) / column(reach, x)
        own["at"] = ball.project(begin, x, bounds)
        own["before"] = own["at"].clone()
        own["peak"], own["peak_gradient"] = own["at"].clone(), torch.zeros_like(x)
        zeros = torch.zeros(len(x), device=x.device)
        own["peak_loss"], own["last_loss"] = zeros - torch.inf, zeros - torch.inf
        own["window_loss"], own["rises"] = zeros - torch.inf, zeros.clone()
        own["size"] = 2 * self.setting.eps(state).flatten().clone()
        own["window"] = torch.full_like(own["t"], self.first)
        own["since"] = torch.zeros_like(own["t"])
        own["reduced"] = torch.ones_like(state["hit"])
        return own

    def query(self, state: State) -> Query:
        """Gradients, except where every row only checks its last point."""
        return Query(state["at"], "logits" if self.ending(state) else "loss_grad", self.copies, self.loss)

    def step(self, state: State, answer: Answer) -> State:
        """Bookkeeping of the best point, the checkpoint where one is due, and the two-term step."""
        assert answer.loss is not None
        t, at, loss = state["t"], state["at"], answer.loss
        changed: State = {"t": t + 1, "last_loss": loss}
        if answer.gradient is None:
            return changed
        best = loss > state["peak_loss"]
        peak = choose(best, at, state["peak"])
        peak_gradient = choose(best, answer.gradient, state["peak_gradient"])
        peak_loss = torch.where(best, loss, state["peak_loss"])
        changed.update(peak=peak, peak_gradient=peak_gradient, peak_loss=peak_loss)
        rises = state["rises"] + (loss > state["last_loss"]) * (t > 0)
        since = state["since"] + (t > 0)
        back, book = self._checkpoint(state, rises, since, peak_loss)
        changed.update(book)
        window_begins = t == 0  # the first window compares with the starting point's loss
        changed["window_loss"] = torch.where(window_begins, loss, changed["window_loss"])
        origin = choose(back, peak, at)
        gradient = choose(back, peak_gradient, answer.gradient)
        changed["at"], changed["before"] = self._move(state, origin, gradient, changed["size"]), origin
        return changed

    def _checkpoint(
        self, state: State, rises: Tensor, since: Tensor, peak_loss: Tensor
    ) -> tuple[Tensor, State]:
        """Which rows go back to their best point, and the schedule's new entries."""
        window = state["window"]
        due = since >= window
        oscillates = rises <= window * _RHO
        stuck = ~state["reduced"] & (state["window_loss"] >= peak_loss)
        halve = due & (oscillates | stuck)
        book: State = {
            "size": torch.where(halve, state["size"] / 2, state["size"]),
            "reduced": torch.where(due, oscillates | stuck, state["reduced"]),
            "window_loss": torch.where(due, peak_loss, state["window_loss"]),
            "window": torch.where(due, (window - self.shrink).clamp_min(self.shortest), window),
            "since": torch.where(due, 0, since),
            "rises": torch.where(due, 0.0, rises),
        }
        return halve, book

    def _move(self, state: State, origin: Tensor, gradient: Tensor, size: Tensor) -> Tensor:
        """z = Π(x + η d); x' = Π(x + α (z − x) + (1 − α)(x − x_before)), without the second term on the first step."""
        alpha = torch.where(state["t"] > 0, _MOMENTUM, 1.0)
        ball = self.setting.ball(state)
        return ball.two_terms(origin, state["before"], gradient, size, alpha, state["x"], self.setting.bounds)


class SparseAPGDRule(APGDRule):
    """l1-APGD (Croce & Hein 2021, arXiv:2103.01208, alg. 1): the sparsity of the step follows that of the best point.

    The steps are split over the radii 3ε, 2ε, ε (fractions 0.3, 0.3, 0.4); each phase starts from the last one's best
    point, projected. Only points of the last phase count, which `feasible` makes the engine check.
    """

    feasible = False
    scouted = False
    _fractions = (0.3, 0.6)

    def __init__(
        self, setting: Setting, steps: int, loss: Loss, copies: int = 1, reference: bool = False
    ) -> None:
        super().__init__(setting, steps, loss, copies, reference)
        self.every = max(int(0.04 * steps), 1)
        self.changes = [int(part * steps) for part in self._fractions]

    def start(self, state: State) -> State:
        """A random point of the tripled ball, and a fifth of the coordinates per step."""
        own = super().start(self._phase({**state, "t": torch.zeros_like(state["y"])}))
        count = state["x"][0].numel()
        own["keep"] = torch.full((len(state["x"]),), 0.2, device=state["x"].device)
        own["sparsity"] = torch.full_like(own["keep"], float(count))
        own["size"] = self._radius({**state, **own})
        return own

    def _radius(self, state: State) -> Tensor:
        """(B,) radius of each row's phase."""
        eps = self.setting.eps(state).flatten()
        factor = 3 - sum((state["t"] >= change).float() for change in self.changes)
        return eps * factor

    def _phase(self, state: State) -> State:
        return {**state, "eps": self._radius(state)}

    def step(self, state: State, answer: Answer) -> State:
        """As Algorithm 1, with the phases' radii and the sparsity update in place of the halving."""
        assert answer.loss is not None
        t, loss = state["t"], answer.loss
        changed: State = {"t": t + 1, "last_loss": loss}
        if answer.gradient is None:
            return changed
        best = loss > state["peak_loss"]
        peak = choose(best, state["at"], state["peak"])
        peak_gradient = choose(best, answer.gradient, state["peak_gradient"])
        changed["peak_loss"] = torch.where(best, loss, state["peak_loss"])
        since = state["since"] + (t > 0)
        due = since >= self.every
        changed["since"] = torch.where(due, 0, since)
        radius = self._radius(state)
        sparsity = ((peak - state["x"]).flatten(1) != 0).sum(1).float()
        sparser = due & (sparsity / state["sparsity"] < 0.95)
        size = torch.where(sparser, radius, torch.where(due, state["size"] / 1.5, state["size"]))
        size = size.clamp(radius / 10, radius)
        changed["size"] = size
        changed["keep"] = torch.where(due, sparsity / state["x"][0].numel() / 1.5, state["keep"])
        changed["sparsity"] = torch.where(due, sparsity.clamp_min(1), state["sparsity"])
        origin = choose(sparser, peak, state["at"])
        gradient = choose(sparser, peak_gradient, answer.gradient)
        after = self._phase({**state, "t": t + 1})
        ball, x, bounds = self.setting.ball(after), state["x"], self.setting.bounds
        moved = ball.step(origin, gradient, size, x, bounds, changed["keep"])
        return self._next_phase(state, after, changed, peak, peak_gradient, moved)

    def _next_phase(
        self, state: State, after: State, changed: State, peak: Tensor, peak_gradient: Tensor, moved: Tensor
    ) -> State:
        """Rows whose radius shrinks begin again at their best point, projected on the smaller ball."""
        smaller = after["eps"] < self._radius(state)
        ball = self.setting.ball(after)
        inside = ball.project(peak, state["x"], self.setting.bounds) if bool(smaller.any()) else peak
        changed["at"] = choose(smaller, inside, moved)
        changed["peak"], changed["peak_gradient"] = peak, peak_gradient
        changed["peak_loss"] = torch.where(smaller, -torch.inf, changed["peak_loss"])
        changed["size"] = torch.where(smaller, after["eps"], changed["size"])
        changed["keep"] = torch.where(smaller, 0.2, changed["keep"])
        changed["sparsity"] = torch.where(smaller, float(state["x"][0].numel()), changed["sparsity"])
        changed["since"] = torch.where(smaller, 0, changed["since"])
        return changed


@dataclass(frozen=True, kw_only=True)
class APGDBase(Attack):
    """What the variants of Auto-PGD share.

    Attributes:
        steps: gradients per start.
        restarts: random starts.
        copies: forwards each gradient is averaged over (EOT).
    """

    steps: int = 100
    restarts: int = 1
    copies: int = 1
    loss_name: ClassVar[str] = ""

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or self.restarts < 1 or self.copies < 1:
            raise RobustError(
                f"steps={self.steps}, restarts={self.restarts}, copies={self.copies}: each at least 1"
            )
        kind = SparseAPGDRule if self.threat.norm == "l1" else APGDRule
        rule = kind(setting_of(trial), self.steps, get_loss(self.pick_loss(trial)), self.copies)
        run_rule(rule, trial, make_jobs(trial, self.restarts, self.aims(trial)))

    def pick_loss(self, trial: Trial) -> str:
        """The loss's registry name, given the number of classes."""
        return self.loss_name

    def aims(self, trial: Trial) -> Tensor | None:
        """(T, N) classes that the loss is aimed at, or None."""
        return None


@dataclass(frozen=True, kw_only=True)
class APGDCE(APGDBase):
    """Auto-PGD on cross-entropy (Croce & Hein 2020, arXiv:2003.01690; in l1 arXiv:2103.01208)."""

    loss_name: ClassVar[str] = "cross-entropy"


@dataclass(frozen=True, kw_only=True)
class APGDDLR(APGDBase):
    """Auto-PGD on the difference of logits ratio (Croce & Hein 2020, arXiv:2003.01690); below 3 classes the margin."""

    def pick_loss(self, trial: Trial) -> str:
        """DLR from 3 classes (4 with a target), else the margin."""
        return "dlr" if trial.classes >= (4 if trial.targets is not None else 3) else "margin"


@dataclass(frozen=True, kw_only=True)
class APGDT(APGDBase):
    """Auto-PGD on the targeted DLR, one run per runner-up class (Croce & Hein 2020, arXiv:2003.01690).

    Below 4 classes, where the targeted DLR is not defined, the loss is z_t − z_y.

    Attributes:
        n_targets: the most likely wrong classes that are tried, at most classes − 1.
    """

    n_targets: int = 9

    def pick_loss(self, trial: Trial) -> str:
        """The targeted DLR from 4 classes."""
        return "targeted-dlr" if trial.classes >= 4 else "combined-targeted"

    def aims(self, trial: Trial) -> Tensor | None:
        """The runner-up classes, or the one target that was asked for."""
        if self.n_targets < 1:
            raise RobustError(f"n_targets={self.n_targets} aims at nothing; give at least 1")
        assert self.n_targets * self.restarts < 1 << JOB_BITS
        return None if trial.targets is not None else ranked_targets(trial, self.n_targets)
