"""Boundary attack: a walk along the decision boundary by rejection sampling (Brendel et al. 2018, arXiv:1712.04248)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robust.attacks.blackbox.decision import DecisionAttack, DecisionRule
from robust.attacks.phases import Heard, Rows
from robust.attacks.rule import Setting, State, choose
from robust.errors import RobustError

AROUND, CLOSER = 2, 3
_TIMES = (2.0, 1.0, 0.5, 0.25)  # source steps that are asked about side by side, in units of the row's own
_SMALLEST, _LARGEST = 1e-6, 0.5


class BoundaryRule(DecisionRule):
    """Algorithm 1 of the paper, every row with its own step sizes.

    AROUND asks for `width` random orthogonal steps of length δ · distance on the sphere around the clean point. CLOSER
    asks for source steps from their mean, those that stayed adversarial counted, and takes the nearest adversarial one.
    """

    def __init__(self, setting: Setting, queries: int, sizes: tuple[float, float], adaptation: float) -> None:
        super().__init__(setting, queries)
        self.sizes, self.adaptation = sizes, adaptation

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        own = super().start(state)
        orthogonal, source = (torch.full_like(own["low"], size) for size in self.sizes)
        return own | {"orthogonal": orthogonal, "source": source, "around": state["x"].clone()}

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == AROUND:
            draws = self.setting.draws({"identity": rows["identity"]}, "boundary", rows["t"])
            noise = draws.normal(self.width, *rows["x"].shape[1:]).to(rows["x"])
            return self._sideways(rows, noise)
        if phase == CLOSER:
            times = torch.tensor(_TIMES, device=rows["x"].device)
            shares = (rows["source"][:, None] * times).clamp_max(_LARGEST)
            x, around = rows["x"][:, None], rows["around"][:, None]
            return torch.lerp(around, x, shares.view(*shares.shape, 1, 1, 1))
        return super().propose(phase, rows)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == AROUND:
            return self._walked(rows, points, heard)
        if phase == CLOSER:
            return self._approached_source(rows, points, heard)
        return super().learn(phase, rows, points, heard)

    def landed(self, rows: Rows, at: Tensor) -> State:
        """The walk begins."""
        return {"phase": torch.full_like(rows["phase"], AROUND)}

    def _sideways(self, rows: Rows, noise: Tensor) -> Tensor:
        """(b, k, C, H, W) `at` moved by δ along the part of each noise orthogonal to x − at, back on the sphere."""
        away = (rows["at"] - rows["x"]).flatten(1)[:, None]
        length = away.norm(dim=2, keepdim=True).clamp_min(1e-12)
        unit, flat = away / length, noise.flatten(2)
        flat = flat - (flat * unit).sum(2, keepdim=True) * unit
        step = rows["orthogonal"][:, None, None] * length
        flat = flat * (step / flat.norm(dim=2, keepdim=True).clamp_min(1e-12))
        delta = (away + flat) * (length / (away + flat).norm(dim=2, keepdim=True).clamp_min(1e-12))
        points: Tensor = rows["x"][:, None] + delta.view_as(noise)
        return points

    def _walked(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """The mean of the steps that stayed adversarial; δ grows where over half of them did, else it shrinks."""
        weight = heard.hit.float()
        rate = weight.sum(1) / heard.asked.sum(1).clamp_min(1)
        moves = torch.einsum("bk,bk...->b...", weight, points - rows["at"][:, None])
        mean = self._sideways(rows, moves[:, None])[:, 0]
        grown = rows["orthogonal"] * self.adaptation ** (2 * rate - 1)
        found = rate > 0
        return {
            "around": choose(found, mean, rows["at"]),
            "orthogonal": grown.clamp(_SMALLEST, _LARGEST),
            "phase": torch.full_like(rows["phase"], CLOSER),
        }

    def _approached_source(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """The longest source step that is adversarial becomes the row's point, and its size the row's step."""
        hit, any_hit = heard.hit, heard.hit.any(1)
        best = hit.int().argmax(1)
        taken = points[torch.arange(len(hit), device=hit.device), best]
        factor = torch.tensor(
            [self.adaptation, 1.0, 1 / self.adaptation, 1 / self.adaptation], device=hit.device
        )
        source = rows["source"] * torch.where(any_hit, factor[best], self.adaptation**-2)
        return {
            "at": choose(any_hit, taken, rows["at"]),
            "source": source.clamp(_SMALLEST, _LARGEST),
            "phase": torch.full_like(rows["phase"], AROUND),
        }


@dataclass(frozen=True, kw_only=True)
class Boundary(DecisionAttack):
    """Boundary attack (Brendel et al. 2018, arXiv:1712.04248): orthogonal and source steps along the boundary, in l2.

    Departures from the paper: it starts at the boundary on the way to the first adversarial point, tries several
    orthogonal steps and source steps side by side, and walks on along the mean of those that stayed adversarial.

    Attributes:
        queries: the most queries per sample; the paper takes up to a million, this is the customary budget of today.
        orthogonal_step: first length of the orthogonal steps, as a share of the distance to the clean point.
        source_step: first length of the steps towards the clean point, as a share of the distance. Customary is 0.01
            for both, which a budget of thousands spends on adapting them.
        adaptation: factor by which step sizes grow or shrink at most, above 1.
    """

    orthogonal_step: float = 0.3
    source_step: float = 0.1
    adaptation: float = 1.5

    def rule(self, setting: Setting) -> BoundaryRule:
        """See `DecisionAttack.rule`."""
        sizes = (self.orthogonal_step, self.source_step)
        if not 0 < min(sizes) <= max(sizes) <= _LARGEST or not self.adaptation > 1:
            raise RobustError(
                f"orthogonal_step={sizes[0]}, source_step={sizes[1]}, adaptation={self.adaptation}: "
                f"in (0, {_LARGEST}], and above 1"
            )
        return BoundaryRule(setting, self.queries, sizes, self.adaptation)
