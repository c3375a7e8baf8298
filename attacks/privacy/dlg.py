"""Deep leakage from gradients, with labels that are sought as well, or read from the gradient first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust.attacks.privacy.inversion import DTYPES, STARTS, GradientInversion, Problem, require
from robust.inversion import Recovery
from robust.rng import Draws, identities

_TURN = 20  # iterations between two looks at the tolerance, as DLG's authors take for one


@dataclass(frozen=True, kw_only=True)
class GradientMatching(GradientInversion):
    """What both share: L-BFGS on ‖g(x', y') - g‖² / ‖g‖², g the observed gradient; the best restart counts.

    The line search keeps strong Wolfe's conditions, and sums are float64: without either it diverges on some images.

    Attributes:
        steps: iterations of L-BFGS for each restart.
        restarts: how many starts are tried, until one is below the tolerance.
        history: pairs that L-BFGS remembers.
        start: "noise" (uniform), "grey", or "prior", a guess that the attacker brings.
        tolerance: an objective at which there is nothing left to find.
        precision: "float64" or "float32".
    """

    steps: int = 1000
    restarts: int = 1
    history: int = 100
    start: Literal["noise", "grey", "prior"] = "noise"
    tolerance: float = 1e-8
    precision: Literal["float32", "float64"] = "float64"

    def __post_init__(self) -> None:
        require(
            self.name,
            self.steps >= 1 and self.restarts >= 1 and self.history >= 1 and self.tolerance >= 0,
            f"steps={self.steps}, restarts={self.restarts}, history={self.history}, tolerance={self.tolerance}: "
            "at least 1 each, and not negative",
        )
        require(self.name, self.start in STARTS, f"start={self.start!r} is none of {', '.join(STARTS)}")
        require(
            self.name,
            self.precision in DTYPES,
            f"precision={self.precision!r} is none of {', '.join(DTYPES)}",
        )

    def dtype(self) -> torch.dtype:
        """See `GradientInversion.dtype`."""
        return DTYPES[self.precision]

    def recover(self, problem: Problem) -> Recovery:
        """See `GradientInversion.recover`."""
        best: _Descent | None = None
        tracks = []
        for restart, u in enumerate(problem.starts(self.restarts, self.start)):
            found = self._descend(problem, u, restart)
            tracks.append(found.track)
            if best is None or found.objective < best.objective:
                best = found
            if best.objective <= self.tolerance:
                break
        assert best is not None
        longest = max(len(track) for track in tracks)
        track = torch.full((len(tracks), longest), math.nan)
        for row, values in zip(track, tracks, strict=True):
            row[: len(values)] = torch.tensor(values)
        return Recovery(best.u, best.labels, best.objective, track, 0, best.objective <= self.tolerance)

    def objective(self, problem: Problem, u: Tensor, p: Tensor) -> Tensor:
        """What is made small, of images u (batch, C, H, W) in [0, 1] with labels p (batch, classes)."""
        apart = problem.gradient(u, p) - problem.values
        return apart.square().sum() / problem.values.square().sum()

    def _descend(self, problem: Problem, u: Tensor, restart: int) -> _Descent:
        """One restart."""
        free, labels = self._free(problem, u, restart)
        track: list[float] = []
        best = _Descent(u.detach().clone(), labels().argmax(1), math.inf, track)
        optimizer = torch.optim.LBFGS(
            free, max_iter=_TURN, max_eval=2 * _TURN, history_size=self.history, tolerance_grad=0.0,
            tolerance_change=0.0, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            with torch.enable_grad():
                objective = self.objective(problem, free[0], labels())
                slopes = torch.autograd.grad(objective, free)
            for tensor, slope in zip(free, slopes, strict=True):
                tensor.grad = slope
            value = float(objective.detach())
            if value < best.objective:
                best.objective, best.u = value, free[0].detach().clone()
                best.labels = labels().detach().argmax(1)
            return objective.detach()

        for turn in range(0, self.steps, _TURN):
            optimizer.param_groups[0]["max_iter"] = min(_TURN, self.steps - turn)
            last = best.objective
            value = float(optimizer.step(closure))
            track += [best.objective] * min(_TURN, self.steps - turn)
            if not math.isfinite(value) or best.objective <= self.tolerance or best.objective == last:
                break
        return best

    def _free(self, problem: Problem, u: Tensor, restart: int) -> tuple[list[Tensor], Callable[[], Tensor]]:
        """What is sought, the images first, and the labels' probabilities as a function of it."""
        images = u.detach().clone().requires_grad_()
        if problem.labels is not None:
            fixed = problem.one_hot(problem.labels)
            return [images], lambda: fixed
        rows = identities(torch.tensor([problem.index]), restart)
        drawn = Draws(problem.seed, "inversion/labels", rows).normal(problem.protocol.batch, problem.classes)
        dummies = drawn[0].to(u).requires_grad_()
        return [images, dummies], lambda: dummies.softmax(1)


@dataclass
class _Descent:
    """The best of one restart so far."""

    u: Tensor
    labels: Tensor
    objective: float
    track: list[float]


@dataclass(frozen=True, kw_only=True)
class DLG(GradientMatching):
    """Deep leakage from gradients (Zhu et al. 2019, arXiv:1906.08935): images and labels of the same gradient."""

    def infers(self) -> bool:
        """See `GradientInversion.infers`."""
        return False


@dataclass(frozen=True, kw_only=True)
class IDLG(GradientMatching):
    """Improved DLG (Zhao et al. 2020, arXiv:2001.02610): the label is read from the last layer's gradient first."""
