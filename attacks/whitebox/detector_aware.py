"""An attack that knows the detector: it wants a wrong class and a score that no threshold stops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.rule import choose, column
from robust.attacks.trial import Trial, targets_of
from robust.attacks.whitebox.minimum import cosine
from robust.classifier import Classifier, clear, misclassified
from robust.detector import Detects
from robust.errors import RobustError
from robust.losses import margin
from robust.rng import Draws, derive, identities
from robust.threat import Threat

Method = Literal["orthogonal", "selective"]
_SIZES = (16, 64)  # rows of a batch, padded: fixed shapes give a sample the same bits in any company
_LOOKS = 5  # a randomised detector is asked without gradient so often in a walk
_RIGHT = 1e30  # a point that is classified rightly ranks below every other


@dataclass(frozen=True, kw_only=True)
class DetectorAware(Attack):
    """Selective or orthogonal PGD around a detector (Bryniarski et al. 2021, arXiv:2106.15023).

    While a point is classified rightly a step raises the margin loss, else it lowers the detector's score; "orthogonal"
    takes out of each gradient its part along the other one, "selective" does not; neither is always better. The score
    has the gradient that the detector declares (BPDA), and draws anew at every step where it is randomised (EOT). Step
    sizes fall by a half cosine. Success means a wrong class *and* no flag. In "strongest" a walk goes on and lowers the
    score further, so that its points serve every threshold; in "broken" a sample stops at its first success.

    Without a detector it is PGD on the margin.

    Attributes:
        detector: what to get past: a fitted detector, or anything with its `score`, `threshold` and `flags`.
        method: "selective" or "orthogonal"; restarts alternate, this one first.
        steps: gradients per start, each of the margin and of the score.
        step_size: the first, in the unit of x; None for 2.5 · eps / √steps, at most eps / 4, which then falls.
        restarts: starts, each random.
        kappa: the margin above which a point counts as wrong while it walks, so that the last step cannot lose it.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")
    detector: Detects | None = None
    method: Method = "selective"
    steps: int = 100
    step_size: float | None = None
    restarts: int = 2
    kappa: float = 0.0

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`: the score takes about as much as the margin."""
        return 2 * super().passes(**chosen)

    def config(self) -> dict[str, Any]:
        """See `Attack.config`; a detector is told by its description."""
        found = super().config()
        return {**found, "detector": None if self.detector is None else self.detector.describe()}

    def make_trial(self, *arguments: Any, **options: Any) -> tuple[Trial, str | None]:
        """See `Attack.make_trial`; what the detector flags is no success."""
        trial, named = super().make_trial(*arguments, **options)
        if self.detector is not None:
            detector = self.detector

            def veto(points: Tensor, rows: Tensor) -> Tensor:
                return detector.flags(points, index=trial.index[rows.cpu()]).to(points.device)

            trial.veto = veto
        return trial, named

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        if self.steps < 1 or self.restarts < 1 or not self.kappa >= 0:
            raise RobustError(
                f"steps={self.steps}, restarts={self.restarts}, kappa={self.kappa}: at least 1, 1 and 0"
            )
        if self.step_size is not None and not self.step_size > 0:
            raise RobustError(f"step_size={self.step_size} must be positive")
        if self.method not in ("orthogonal", "selective"):
            raise RobustError(f"method={self.method!r} is unknown; use 'orthogonal' or 'selective'")
        total = self.restarts * len(trial.x)
        for restart in range(self.restarts):
            rows = (~trial.finished()).nonzero()[:, 0]
            for part in rows.split(_SIZES[-1]) if len(rows) else ():
                Walk(self, trial, part, restart).run()
                trial.progress((restart * len(trial.x) + int(part[-1]) + 1) / total)


class Walk:
    """One start of up to 64 samples, padded to a fixed batch."""

    def __init__(self, attack: DetectorAware, trial: Trial, rows: Tensor, restart: int) -> None:
        size = next(size for size in _SIZES if len(rows) <= size)
        self.attack, self.trial, self.count = attack, trial, len(rows)
        self.rows = torch.cat([rows, rows[:1].expand(size - len(rows))])
        self.x, self.y = trial.x[self.rows], trial.y[self.rows]
        self.targets = targets_of(trial.targets, self.rows)
        self.mask = targets_of(trial.mask, self.rows)
        self.threat: Threat = trial.threat.take(self.rows)
        self.index = trial.index[self.rows.cpu()]
        self.identity = identities(self.index, restart).to(self.x.device)
        self.seed = derive(trial.seed, "detector-aware", restart)
        self.restart = restart
        self.open = torch.ones(len(self.rows), dtype=torch.bool, device=self.x.device)
        assert isinstance(trial.model, Classifier)
        self.model: Classifier = trial.model

    def run(self) -> None:
        """From the clean point or, in every restart but the first, from a random one too; best points are offered."""
        steps, bounds = self.attack.steps, self.trial.bounds
        self._look(self.x, 0, last=True)
        at = self._masked(self.threat.random(self.x, bounds, Draws(self.seed, "start", self.identity)))
        size = self._first_size()
        for t in range(steps):
            if self.trial.until == "broken" and not bool(self.open[: self.count].any()):
                return
            gradient = self._look(at, t + 1, last=False)
            assert gradient is not None
            falling = cosine(1.0, 0.02, torch.tensor(t), steps)
            moved = self.threat.step(at, gradient, size * float(falling), self.x, bounds)
            at = choose(self.open, self._masked(moved), at)
        self._look(at, steps + 1, last=True)

    def _look(self, at: Tensor, t: int, last: bool) -> Tensor | None:
        """Offers the points, and gives the direction of the next step; None of the last look of all."""
        before, detector = self.model.cost.forwards, self.attack.detector
        at = at.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = self.model(at)
            gains = margin(logits, self.y, self.targets)
            score = None if detector is None else detector.score(at, seed=self.seed, index=self.index, step=t)
        if score is not None and detector is not None and detector.randomised and not last:
            rare = t % max(self.attack.steps // _LOOKS, 1) == 0
            told = self._scored(at, t) if rare else None
        else:
            told = None if score is None else score.detach()
        if detector is None or told is not None:
            self._offer(at.detach(), logits.detach(), told)
        wrong = gains.detach() > self.attack.kappa
        direction = None if last else self._direction(at, gains, score, wrong)
        spent = self.model.cost.forwards - before
        self.model.cost.forwards -= spent * (len(self.rows) - self.count) // len(self.rows)
        if not last:
            self.model.cost.backwards += self.count * (1 if detector is None else 2)
        return direction

    def _scored(self, at: Tensor, t: int) -> Tensor:
        """A randomised detector's score in full, by draws that are the attacker's own."""
        assert self.attack.detector is not None
        with torch.no_grad():
            return self.attack.detector.score(
                at.detach(), seed=derive(self.seed, "look"), index=self.index, step=t
            )

    def _direction(self, at: Tensor, gains: Tensor, score: Tensor | None, wrong: Tensor) -> Tensor:
        """(B, C, H, W): the margin's gradient, or the detector's downwards where the class is wrong already."""
        (rise,) = torch.autograd.grad(gains.sum(), at, retain_graph=score is not None)
        rise = rise.nan_to_num(0.0, 0.0, 0.0)
        if score is None:
            return rise.contiguous()
        fall = torch.zeros_like(rise)
        if score.requires_grad:
            finite = torch.where(score.isfinite(), score, torch.zeros_like(score))
            (slope,) = torch.autograd.grad(finite.sum(), at)
            fall = -slope.nan_to_num(0.0, 0.0, 0.0)
        if (self.restart % 2 == 0) == (self.attack.method == "orthogonal"):
            return choose(wrong, _apart(fall, rise), _apart(rise, fall)).contiguous()
        return choose(wrong, fall, rise).contiguous()

    def _offer(self, at: Tensor, logits: Tensor, score: Tensor | None) -> None:
        """Hands the points to the trial: wrong and unflagged first, then wrong with a low score, then by margin."""
        detector, keep = self.attack.detector, slice(0, self.count)
        hit = misclassified(logits, self.y, self.targets)
        gains = margin(logits, self.y, self.targets).nan_to_num(0.0, 0.0, 0.0)
        rank = gains.clone()
        if score is not None and detector is not None:
            lacking = (-gains).clamp_min(0)
            right = -_RIGHT * (2 + lacking / (1 + lacking))  # in order of the margin, and below every score
            rank = torch.where(hit, -score.nan_to_num(_RIGHT, _RIGHT, -_RIGHT), right)
            hit = hit & (score <= detector.threshold)
        sure = hit & clear(logits, self.y, self.targets)
        self.trial.offer(self.rows[keep], at[keep], hit[keep], sure[keep], rank[keep])
        if self.trial.until == "broken":
            self.open &= ~sure

    def _first_size(self) -> Tensor:
        """(B,) the first step's length."""
        eps: Tensor = torch.as_tensor(self.threat.eps, dtype=torch.float32, device=self.x.device)
        if self.attack.step_size is not None:
            return torch.full((len(self.rows),), self.attack.step_size, device=self.x.device)
        first: Tensor = (eps * min(2.5 / self.attack.steps**0.5, 0.25)).expand(len(self.rows))
        return first.contiguous()

    def _masked(self, points: Tensor) -> Tensor:
        return points if self.mask is None else torch.where(self.mask, points, self.x)


def _apart(gradient: Tensor, other: Tensor) -> Tensor:
    """The gradient without its part along the other one, row by row; itself where nothing would be left of it."""
    flat, along = gradient.flatten(1).double(), other.flatten(1).double()
    share = (flat * along).sum(1) / along.square().sum(1).clamp_min(1e-300)
    rest = gradient - column(share, gradient).to(gradient) * other
    small = rest.flatten(1).abs().amax(1) <= 1e-6 * gradient.flatten(1).abs().amax(1)
    return choose(small, gradient, rest)
