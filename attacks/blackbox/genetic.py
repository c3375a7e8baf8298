"""GenAttack: a genetic algorithm on scores (Alzantot et al. 2019, arXiv:1805.11090)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.blackbox.score import ScoreAttack, ScoreRule, radii
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import Setting, State, column
from robust.errors import RobustError
from robust.rng import Draws

_PATIENCE = 100  # generations without progress that shrink the mutations
_RATES, _RANGES = (
    (0.5, 0.1),
    (0.4, 0.15),
)  # first and least share of mutated coordinates, and their reach in eps


class GenAttackRule(ScoreRule):
    """Algorithm 1 of the paper with its adaptive parameters; a member of the population is a change in units of eps.

    Fitness is the margin. The fittest member lives on, and is not asked again: the others are children of two parents,
    drawn by the softmax of their fitness, who give each coordinate in proportion to it, and are then mutated.
    """

    def __init__(self, setting: Setting, queries: int, shape: tuple[int, ...], attack: GenAttack) -> None:
        super().__init__(setting, queries)
        self.attack, self.count = attack, attack.population
        self.width = attack.population
        sides = shape[1:] if attack.cells is None else [min(attack.cells, side) for side in shape[1:]]
        self.shape = (shape[0], *sides)

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        x, own = state["x"], super().start(state)
        own["members"] = x.new_zeros(len(x), self.count, *self.shape)
        own["fitness"] = x.new_full((len(x), self.count), -torch.inf)
        own |= {"peak": x.new_full((len(x),), -torch.inf), "waited": torch.zeros_like(own["t"])}
        return own | {"plateaus": torch.zeros_like(own["t"])}

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        changes = self._children(rows) if phase else self._mutations(rows, self.count)
        whole = changes.flatten(0, 1)
        if self.attack.cells is not None:
            whole = F.interpolate(whole, size=rows["x"].shape[2:], mode="bilinear", align_corners=False)
        eps = column(radii(self, rows), rows["x"])[:, None]
        return rows["x"][:, None] + eps * whole.view(*changes.shape[:2], *whole.shape[1:])

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`; the fittest member comes first."""
        assert heard.loss is not None
        fitness = heard.loss.masked_fill(~heard.asked, -torch.inf).nan_to_num(-torch.inf)
        members = self._children(rows) if phase else self._mutations(rows, self.count)
        if phase:
            members = torch.cat((rows["members"][:, :1], members), 1)
            fitness = torch.cat((rows["fitness"][:, :1], fitness), 1)
        order = fitness.argsort(dim=1, descending=True, stable=True)
        fitness = fitness.gather(1, order)
        risen = fitness[:, 0] > rows["peak"] + 1e-5
        waited = torch.where(risen, 0, rows["waited"] + 1)
        stuck = waited >= _PATIENCE
        places = torch.arange(len(order), device=order.device)[:, None]
        return {
            "members": members[places, order],
            "fitness": fitness,
            "peak": torch.where(risen, fitness[:, 0], rows["peak"]),
            "waited": torch.where(stuck, 0, waited),
            "plateaus": rows["plateaus"] + stuck,
            "phase": torch.ones_like(rows["phase"]),
        }

    def _mutations(self, rows: Rows, count: int) -> Tensor:
        """(b, count, C, h, w) noise on a random share of the coordinates; everywhere and to the edge at first."""
        draws = self.draws(rows, "genetic")
        noise = 2 * draws.uniform(count, *self.shape).to(rows["x"]) - 1
        if int(rows["phase"][0]) == 0:
            return noise
        shrink = 0.9 ** rows["plateaus"]
        rate, reach = (column((first * shrink).clamp_min(least), noise) for first, least in (_RATES, _RANGES))
        chosen = draws.branch("where").uniform(count, *self.shape).to(noise) < rate
        return noise * reach * chosen

    def _children(self, rows: Rows) -> Tensor:
        """(b, population − 1, C, h, w) the next generation without its elite."""
        count, fitness, members = self.count - 1, rows["fitness"], rows["members"]
        draws = self.draws(rows, "genetic-parents")
        chance = (fitness / self.attack.temperature).softmax(1)
        parents = self._parents(chance, draws, 2 * count)
        places = torch.arange(len(parents), device=parents.device)[:, None]
        mother, father = members[places, parents[:, :count]], members[places, parents[:, count:]]
        ours, theirs = chance.gather(1, parents).chunk(2, 1)
        share = (ours / (ours + theirs).clamp_min(1e-30))[:, :, None, None, None]
        taken = draws.branch("crossover").uniform(count, *self.shape).to(members) < share
        return (torch.where(taken, mother, father) + self._mutations(rows, count)).clamp(-1, 1)

    @staticmethod
    def _parents(chance: Tensor, draws: Draws, count: int) -> Tensor:
        """(b, count) members drawn with their chances."""
        below = draws.uniform(count).to(chance)[:, :, None] > chance.cumsum(1)[:, None]
        return below.sum(2).clamp_max(chance.shape[1] - 1)


@dataclass(frozen=True, kw_only=True)
class GenAttack(ScoreAttack):
    """GenAttack (Alzantot et al. 2019, arXiv:1805.11090): a genetic algorithm on scores, in linf.

    The paper aims at a target; without one the margin of the best wrong class is the fitness.

    Attributes:
        population: members of a generation, at least 2.
        temperature: of the softmax that draws parents.
        cells: side of the changes before they are stretched over the image (the paper's dimensionality reduction);
            None for the image's own.
    """

    norms: ClassVar[tuple[str, ...]] = ("linf",)
    population: int = 6
    temperature: float = 0.3
    cells: int | None = None

    def rule(self, setting: Setting, shape: tuple[int, ...]) -> PhasedRule:
        """See `ScoreAttack.rule`."""
        if self.population < 2:
            raise RobustError(f"population={self.population} has no two parents; give at least 2")
        self.positive("temperature", "cells")
        return GenAttackRule(setting, self.queries, shape, self)
