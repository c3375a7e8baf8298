"""Rotations and shifts that fool a model, by grid or random search (Engstrom et al. 2019, arXiv:1712.02779)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.blackbox.score import ScoreAttack, ScoreRule, inside
from robust.attacks.phases import Heard, Rows
from robust.attacks.rule import Setting, State
from robust.attacks.warp import pixel_grid, sample
from robust.errors import RobustError

_WIDTH = 25  # transformations that a row asks for in one turn


class TransformRule(ScoreRule):
    """Asks for one block of transformations after the other: of the grid, or drawn anew for each row."""

    feasible = True

    def __init__(self, setting: Setting, grid: Tensor | None, limits: Tensor, queries: int) -> None:
        super().__init__(setting, queries)
        self.grid, self.limits = grid, limits
        self.width = min(_WIDTH, queries)

    def start(self, state: State) -> State:
        """Before the first transformation."""
        own = super().start(state)
        own["next"] = torch.zeros_like(own["t"])
        self.limits = self.limits.to(state["x"])
        self.grid = None if self.grid is None else self.grid.to(state["x"])
        return own

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """The next block of transformed images, cut to the ball where that is not the whole box."""
        x, moves = rows["x"], self._moves(rows)
        each = moves.shape[1]
        moved = transformed(x.repeat_interleave(each, 0), moves.flatten(0, 1), self.setting.bounds[0])
        return inside(self, rows, moved.view(len(x), each, *x.shape[1:]))

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """The next block; the engine keeps the best image."""
        return {"next": rows["next"] + self.width}

    def _moves(self, rows: Rows) -> Tensor:
        """(b, width, 3) angles in degrees, and shifts down and across in pixels."""
        turn = rows["next"][:, None] + torch.arange(self.width, device=rows["x"].device)
        if self.grid is not None:
            return self.grid[turn % len(self.grid)]
        draws = self.draws(rows, "transform")
        return (2 * draws.uniform(self.width, 3).to(self.limits) - 1) * self.limits


def transformed(x: Tensor, moves: Tensor, low: float) -> Tensor:
    """Images (B, C, H, W) turned about their middle by degrees, then shifted down and across: moves (B, 3)."""
    height, width = x.shape[2:]
    down, across = pixel_grid(height, width, x)
    angle, shift_down, shift_across = (part.view(-1, 1, 1) for part in moves.unbind(1))
    sine, cosine = (angle * (math.pi / 180)).sin(), (angle * (math.pi / 180)).cos()
    middle_down, middle_across = (height - 1) / 2, (width - 1) / 2
    away_down = down - middle_down - shift_down
    away_across = across - middle_across - shift_across
    from_down = cosine * away_down + sine * away_across + middle_down
    from_across = cosine * away_across - sine * away_down + middle_across
    return sample(x, from_down, from_across, low)


def make_grid(limits: Tensor, angles: int, shifts: int) -> Tensor:
    """(angles · shifts², 3) all combinations of evenly spaced values, in an order that covers the grid early."""
    axes = [
        torch.linspace(-1, 1, count).to(limits) * limit if count > 1 else limit.new_zeros(1)
        for count, limit in zip((angles, shifts, shifts), limits, strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    stride = max(round(len(grid) * (math.sqrt(5) - 1) / 2), 1)
    while math.gcd(stride, len(grid)) > 1:
        stride += 1
    return grid[torch.arange(len(grid), device=grid.device) * stride % len(grid)]


@dataclass(frozen=True, kw_only=True)
class RotationTranslation(ScoreAttack):
    """Rotation and translation (Engstrom et al. 2019, arXiv:1712.02779): grid search or the worst of random draws.

    What leaves the image is lost, what comes in is the box's lower end (black). The largest margin of all counts; with
    until="broken" a sample stops at its first success. It is meant for a threat of the whole box; under a smaller one
    the image is cut to the ball.

    Attributes:
        max_rotation: degrees to either side, in [0, 180].
        max_shift: to each of four sides, as a share of the image's side, in [0, 1]; the paper's 3 pixels of 32 or 24 of
            224, about.
        search: "grid": all combinations of evenly spaced values; "random": `queries` uniform draws (worst-of-k).
        angles: angles of the grid.
        shifts: shifts of the grid along each axis.
        queries: the most transformations per sample; the paper's grid has 31 · 5 · 5, its random search 10.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    semantic: ClassVar[bool] = True
    heuristic: ClassVar[bool] = True  # three numbers lead to few classes
    max_rotation: float = 30.0
    max_shift: float = 0.1
    search: Literal["grid", "random"] = "grid"
    angles: int = 31
    shifts: int = 5
    queries: int = 775

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> TransformRule:
        """See `ScoreAttack.rule`."""
        if not (0 <= self.max_rotation <= 180 and 0 <= self.max_shift <= 1):
            raise RobustError(
                f"max_rotation={self.max_rotation}, max_shift={self.max_shift}: in [0, 180] and in [0, 1]"
            )
        if self.search not in ("grid", "random"):
            raise RobustError(f"search={self.search!r} is unknown; use 'grid' or 'random'")
        if min(self.angles, self.shifts) < 1:
            raise RobustError(f"angles={self.angles}, shifts={self.shifts}: each at least 1")
        limits = torch.tensor([self.max_rotation, self.max_shift * shape[1], self.max_shift * shape[2]])
        grid = make_grid(limits, self.angles, self.shifts) if self.search == "grid" else None
        most = self.queries if grid is None else min(self.queries, len(grid))
        return TransformRule(setting, grid, limits, most)

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`: a grid has no more points than combinations."""
        values = {name: chosen.get(name, getattr(cls, name)) for name in ("search", "angles", "shifts")}
        most = super().passes(**chosen)
        return most if values["search"] == "random" else min(most, values["angles"] * values["shifts"] ** 2)
