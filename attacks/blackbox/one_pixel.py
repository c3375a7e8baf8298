"""One-pixel attack: differential evolution of a few pixels' places and colours (Su et al. 2019, arXiv:1710.08864)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.blackbox.score import ScoreAttack, ScoreRule, radii
from robust.attacks.phases import Heard, Rows
from robust.attacks.rule import Setting, State
from robust.errors import RobustError

_WIDEST = 100  # members that a row asks in one turn,
_NUMBERS = 1 << 20  # and the most numbers that their points may have


class OnePixelRule(ScoreRule):
    """Differential evolution without crossover, one population per row.

    A member is eps pixels, each a place (y, x) and a colour, all in [0, 1]. Its child is r1 + F (r2 − r3) of other
    members, and takes its place if its margin is larger. A turn asks for the children of one block of the population;
    later blocks of a generation see what the earlier ones became.
    """

    def __init__(
        self, setting: Setting, queries: int, population: int, factor: float, shape: tuple[int, ...]
    ) -> None:
        super().__init__(setting, queries)
        self.population, self.factor = population, factor
        self.pixels = min(max(int(setting.threat.radius), 1), shape[1] * shape[2])
        self.width = min(population, _WIDEST, max(_NUMBERS // math.prod(shape), 1))

    def start(self, state: State) -> State:
        """Places uniform over the image, colours normal around the middle of the box, as in the paper."""
        x, own = state["x"], super().start(state)
        draws = self.setting.draws(state, "one-pixel-start")
        shape = (self.population, self.pixels)
        places = draws.uniform(*shape, 2)
        colours = 0.5 + 0.5 * draws.branch("colour").normal(*shape, x.shape[1])
        own["members"] = torch.cat([places, colours], 3).to(x).clamp(0, 1)
        own["fitness"] = torch.full((len(x), self.population), -torch.inf, device=x.device)
        own["next"] = torch.zeros_like(own["t"])
        return own

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """The members of the first generation, then children of the block that is next."""
        return self._painted(rows, self._block(rows)[1])

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """Children that are better than the members in whose places they stand take them."""
        assert heard.loss is not None
        places, children = self._block(rows)
        before = rows["fitness"].gather(1, places)
        loss = heard.loss.nan_to_num(torch.inf)  # what is not a number is misclassified
        better = heard.asked & (loss > before)
        line = torch.arange(len(places), device=places.device)[:, None]
        members, fitness = rows["members"].clone(), rows["fitness"].clone()
        members[line, places] = torch.where(better[:, :, None, None], children, members[line, places])
        fitness[line, places] = torch.where(better, loss, before)
        return {"members": members, "fitness": fitness, "next": rows["next"] + self.width}

    def _block(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(b, width) places in the population, and (b, width, pixels, 2 + C) what is tried in them."""
        members, count = rows["members"], self.population
        turn = rows["next"][:, None] + torch.arange(self.width, device=members.device)
        places = turn % count
        ahead = 1 + self.draws(rows, "one-pixel").below(count - 1, 3 * self.width).view(-1, 3, self.width)
        line = torch.arange(len(members), device=members.device)[:, None]
        parents = [
            (places + ahead[:, : k + 1].sum(1)) % count for k in range(3)
        ]  # neighbours of a chain differ
        first, second, third = (members[line, which] for which in parents)
        children = (first + self.factor * (second - third)).clamp(0, 1)
        fresh = (turn < count)[:, :, None, None]
        return places, torch.where(fresh, members[line, places], children)

    def _painted(self, rows: Rows, members: Tensor) -> Tensor:
        """(b, k, C, H, W) the images with the pixels of `members` (b, k, pixels, 2 + C), at most eps of each row."""
        x = rows["x"]
        height, width = x.shape[2:]
        low, high = self.setting.bounds
        points = x.flatten(2)[:, None].repeat(1, members.shape[1], 1, 1)
        eps = radii(self, rows).view(-1, 1, 1, 1)
        for pixel in range(self.pixels):  # one after the other: two may have the same place
            member = members[:, :, pixel]
            across = (member[..., 1] * width).long().clamp_max(width - 1)
            down = (member[..., 0] * height).long().clamp_max(height - 1)
            place = (down * width + across)[:, :, None, None].expand(-1, -1, x.shape[1], 1)
            colour = (low + (high - low) * member[..., 2:])[..., None]
            colour = torch.where(eps >= pixel + 1, colour, points.gather(3, place))
            points.scatter_(3, place, colour)
        return points.view(*members.shape[:2], *x.shape[1:])


@dataclass(frozen=True, kw_only=True)
class OnePixel(ScoreAttack):
    """One-pixel attack (Su et al. 2019, arXiv:1710.08864): differential evolution of eps pixels' places and colours.

    Departures: the fitness is the margin of the scores instead of the probability of the class; and children replace
    members block by block instead of generation by generation. The paper has 400 members over 100 generations, as here.

    Attributes:
        population: members, at least 4.
        factor: F, the weight of the difference of two members.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0",)
    queries: int = 40_000
    population: int = 400
    factor: float = 0.5

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> OnePixelRule:
        """See `ScoreAttack.rule`."""
        self.positive("factor")
        if self.population < 4:
            raise RobustError(f"population={self.population} breeds nothing; give at least 4")
        return OnePixelRule(setting, self.queries, self.population, self.factor, shape)
