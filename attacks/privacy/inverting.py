"""Inverting gradients: the angle between gradients, total variation, and signs of slopes, many restarts at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robust.attacks.privacy.inversion import DTYPES, STARTS, GradientInversion, Problem, require
from robust.inversion import Recovery

_DROPS = (3 / 8, 5 / 8, 7 / 8)  # of the steps, where the step size falls to a tenth
_BETAS, _SMALL = (0.9, 0.999), 1e-8


def total_variation(u: Tensor) -> Tensor:
    """The mean absolute difference of neighbouring pixels, down plus across; u (…, H, W)."""
    down = (u[..., 1:, :] - u[..., :-1, :]).abs().mean()
    return down + (u[..., 1:] - u[..., :-1]).abs().mean()


@dataclass(frozen=True, kw_only=True)
class InvertingGradients(GradientInversion):
    """Inverting gradients (Geiping et al. 2020, arXiv:2003.14053): cosine distance, total variation, signed Adam.

    The objective is 1 - cos(g(x', y), g) + tv · TV(x'), which does not change when the gradient was scaled, as by
    clipping. Points stay in the box, and the best one of all steps and restarts counts. Restarts run side by side.

    Attributes:
        steps: of Adam; its step size falls to a tenth after 3/8, 5/8 and 7/8 of them.
        restarts: starts that are tried.
        step_size: in widths of the box.
        tv: weight of the total variation of [0, 1] images, a mean over neighbours.
        signed: whether Adam gets the slopes' signs.
        start: "noise" (uniform), "grey", or "prior", a guess that the attacker brings.
        precision: "float32" or "float64".
    """

    steps: int = 1000
    restarts: int = 1
    step_size: float = 0.01
    tv: float = 1e-3
    signed: bool = True
    start: Literal["noise", "grey", "prior"] = "noise"
    precision: Literal["float32", "float64"] = "float32"

    def __post_init__(self) -> None:
        require(
            self.name,
            self.steps >= 1 and self.restarts >= 1 and self.step_size > 0 and self.tv >= 0,
            f"steps={self.steps}, restarts={self.restarts}, step_size={self.step_size}, tv={self.tv}: at least 1 each, "
            "positive, and not negative",
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

    def objective(self, problem: Problem, u: Tensor, p: Tensor) -> Tensor:
        """What is made small, of images u (batch, C, H, W) in [0, 1] with labels p (batch, classes)."""
        g = problem.gradient(u, p)
        cosine: Tensor = (g * problem.values).sum() / (g.norm().clamp_min(1e-20) * problem.values.norm())
        return 1 - cosine + self.tv * total_variation(u)

    def recover(self, problem: Problem) -> Recovery:
        """See `GradientInversion.recover`."""
        assert problem.labels is not None
        p = problem.one_hot(problem.labels)
        slopes = Slopes(lambda point: self.objective(problem, point, p))
        u = problem.starts(self.restarts, self.start)
        first, second = torch.zeros_like(u), torch.zeros_like(u)
        best, least = u.clone(), torch.full((len(u),), torch.inf).to(u)
        track = torch.empty(len(u), self.steps)
        for step in range(self.steps):
            slope, value = slopes(u)
            better = value < least
            least = torch.where(better, value, least)
            best[better] = u[better]
            track[:, step] = least.cpu()
            slope = (slope.sign() if self.signed else slope).nan_to_num(0.0, 0.0, 0.0)
            first.lerp_(slope, 1 - _BETAS[0])
            second.lerp_(slope**2, 1 - _BETAS[1])
            size = self.step_size * 0.1 ** sum(step >= drop * self.steps for drop in _DROPS)
            unbiased = (second / (1 - _BETAS[1] ** (step + 1))).sqrt() + _SMALL
            u = (u - size * first / (1 - _BETAS[0] ** (step + 1)) / unbiased).clamp(0, 1)
        # A stacked pass looks like one to the counter.
        problem.model.evaluations = self.steps * len(u) * problem.protocol.batch * problem.protocol.steps
        row = int(least.nan_to_num(torch.inf).argmin())
        return Recovery(best[row], problem.labels, float(least[row]), track, 0)


class Slopes:
    """Slopes and values of an objective at several points at once: one pass for all, where the model's layers can.

    Args:
        objective: of one point, differentiable.
    """

    def __init__(self, objective: Callable[[Tensor], Tensor]) -> None:
        self._one = torch.func.grad_and_value(objective)
        self._many = torch.func.vmap(self._one)
        self._stacks = True

    def __call__(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Slopes like u (R, …) and values (R,)."""
        if len(u) > 1 and self._stacks:
            try:
                slope, value = self._many(u)
                return slope, value
            except (RuntimeError, NotImplementedError):  # a layer that has no rule for stacks
                self._stacks = False
        found = [self._one(point) for point in u]
        return torch.stack([slope for slope, _ in found]), torch.stack([value for _, value in found])
