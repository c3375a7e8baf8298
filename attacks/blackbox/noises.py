"""What repeated-noise attacks share: noise of ever smaller amounts, as long as some of it misleads."""

from __future__ import annotations

import torch
from torch import Tensor

from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.rule import State
from robust.rng import Draws
from robust.threat import Bounds

_LANES = 20
_LEAST = 0.5  # of the smallest amount that has misled


def salt_and_pepper(draws: Draws, x: Tensor, amounts: Tensor, bounds: Bounds) -> Tensor:
    """(B, k, C, H, W) x with a share `amounts` (B, k) of its pixels black or white, all channels alike."""
    count = amounts.shape[1]
    chance = draws.uniform(count, 1, *x.shape[2:]).to(x)
    half = amounts[:, :, None, None, None] / 2
    noisy = x[:, None].expand(-1, count, -1, -1, -1)
    return torch.where(chance < half, bounds[0], torch.where(chance > 1 - half, bounds[1], noisy))


def amounts_below(most: Tensor, misled: Tensor, count: int) -> Tensor:
    """(B, count) amounts in (0, most]; where noise has misled at `most` (B,), from half of it to just below."""
    share = torch.arange(count, device=most.device)[None] / count
    return most[:, None] * torch.where(misled[:, None] > 0, _LEAST + (1 - _LEAST) * share, share + 1 / count)


class NoiseRule(PhasedRule):
    """Fresh noise at amounts from nothing to all; once some misleads, at amounts a little below the smallest."""

    width = _LANES

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        own = super().start(state)
        return own | {
            "most": torch.ones(len(state["x"]), device=state["x"].device),
            "misled": own["t"].clone(),
        }

    def noisy(self, draws: Draws, x: Tensor, amounts: Tensor) -> Tensor:
        """(b, k, C, H, W) x with noise of `amounts` (b, k) in (0, 1]."""
        raise TypeError(f"{type(self).__name__} makes no noise")

    def _amounts(self, rows: Rows) -> Tensor:
        return amounts_below(rows["most"], rows["misled"], self.width)

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        draws = self.setting.draws({"identity": rows["identity"]}, "noise", rows["t"])
        points = self.noisy(draws, rows["x"], self._amounts(rows))
        if "begin" in rows:
            first = (rows["t"] == 0)[:, None, None, None]
            points[:, 0] = torch.where(first, rows["begin"], points[:, 0])
        return points

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        hit = heard.hit.clone()
        if "begin" in rows:
            hit[:, 0] &= rows["t"] > 0  # a given point says nothing about an amount
        least = torch.where(hit, self._amounts(rows), torch.inf).amin(1)
        return {"most": torch.minimum(rows["most"], least), "misled": rows["misled"] + hit.sum(1)}
