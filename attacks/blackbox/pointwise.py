"""Pointwise attack: noise whose pixels go back to their clean values (Schott et al. 2019, arXiv:1805.09190)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.attacks.blackbox.decision import SEEK, DecisionAttack, DecisionRule
from robust.attacks.blackbox.noises import amounts_below, salt_and_pepper
from robust.attacks.phases import Heard, Rows
from robust.attacks.rule import Setting, State, choose
from robust.errors import RobustError

RESET, JOIN = 2, 3


class PointwiseRule(DecisionRule):
    """Section 4 of the paper's attack, on groups of changed units: pixels in l0, single coordinates elsewhere.

    RESET takes the next groups of a random order, each alone, back to their clean values (later, except in l0, half the
    way: each coordinate's bisection). JOIN asks about all groups together that stayed adversarial alone; if they do not
    together, the first alone goes back. Groups halve after every pass, down to single units. What is left of
    the budget starts over from other noise.
    """

    def __init__(self, setting: Setting, queries: int, width: int) -> None:
        super().__init__(setting, queries)
        self.width = width
        self.pixels = setting.threat.norm == "l0"

    def start(self, state: State) -> State:
        """See `PhasedRule.start`."""
        own = super().start(state)
        for name in ("cursor", "group", "pass", "gained", "halving"):
            own[name] = torch.zeros_like(own["t"])
        return own | {"join": state["x"].clone(), "misled": own["t"].clone(), "most": own["high"].clone()}

    def propose(self, phase: int, rows: Rows) -> Tensor:
        """See `PhasedRule.propose`."""
        if phase == SEEK:
            return self._noisy(rows)
        if phase == RESET:
            return self._moved(rows, self._groups(rows))
        if phase == JOIN:
            return rows["join"][:, None]
        return super().propose(phase, rows)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        """See `PhasedRule.learn`."""
        if phase == SEEK:
            return self._found(rows, points, heard)
        if phase == RESET:
            return self._reset(rows, points, heard)
        if phase == JOIN:
            at = choose(heard.hit[:, 0], rows["join"], rows["at"])
            return self._onwards(rows, at, rows["gained"] + 1)
        return super().learn(phase, rows, points, heard)

    def _noisy(self, rows: Rows) -> Tensor:
        """The given point first; salt and pepper on ever more pixels, then on fewer than what misled."""
        x = rows["x"]
        draws = self.setting.draws({"identity": rows["identity"]}, "pointwise", rows["t"])
        amounts = amounts_below(rows["most"], rows["misled"], self.width)
        points = salt_and_pepper(draws, x, amounts, self.setting.bounds)
        if "begin" in rows:
            points[:, 0] = choose(rows["t"] == 0, rows["begin"], points[:, 0])
        return points

    def _found(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        """Keeps the least noise that misleads; once less of it does not, the resets begin."""
        hit, found = heard.hit, heard.hit.any(1)
        first = hit.int().argmax(1)
        lanes = torch.arange(len(first), device=first.device)
        at = choose(found, points[lanes, first], rows["at"])
        amounts = amounts_below(rows["most"], rows["misled"], self.width)[lanes, first]
        begun = rows["misled"] > 0
        phase = torch.where(begun & ~found, RESET, SEEK)
        if "begin" in rows:
            phase = torch.where(hit[:, 0] & (rows["t"] == 0), RESET, phase)
        lost = ~begun & ~found & (rows["spent"] >= self.tries)
        return {
            "at": at,
            "most": torch.where(found, amounts, rows["most"]),
            "misled": (begun | found).long(),
            "group": self._first_group(self._changed(at, rows["x"]).sum(1)),
            "phase": torch.where(lost, self.DONE, phase),
        }

    def _first_group(self, changed: Tensor) -> Tensor:
        """Half of the changes lie in the first turn's groups."""
        return (changed // (2 * self.width)).clamp_min(1)

    def _changed(self, at: Tensor, x: Tensor) -> Tensor:
        """(b, units) bool."""
        different = at != x
        return (different.any(1) if self.pixels else different).flatten(1)

    def _groups(self, rows: Rows) -> Tensor:
        """(b, width, units) bool: the next groups of changed units in the pass's keyed order."""
        changed = self._changed(rows["at"], rows["x"])
        draws = self.setting.draws({"identity": rows["identity"]}, "pointwise-order", rows["pass"])
        order = torch.where(changed, draws.uniform(changed.shape[1]).to(rows["x"]), 2.0)
        rank = order.argsort(dim=1, stable=True).argsort(dim=1)
        lane = torch.div(rank - rows["cursor"][:, None], rows["group"][:, None], rounding_mode="floor")
        lanes = torch.arange(self.width, device=lane.device)[None, :, None]
        return (lane[:, None] == lanes) & changed[:, None]

    def _moved(self, rows: Rows, groups: Tensor) -> Tensor:
        """(b, k, C, H, W) `at` with groups (b, k, units) taken back to the clean values, or half the way."""
        at, x = rows["at"], rows["x"]
        shape = (1, *x.shape[2:]) if self.pixels else x.shape[1:]
        back = choose(rows["halving"] > 0, (at + x) / 2, x)
        return torch.where(groups.unflatten(2, shape), back[:, None], at[:, None])

    def _reset(self, rows: Rows, points: Tensor, heard: Heard) -> State:
        hit, count = heard.hit, heard.hit.sum(1)
        groups = self._groups(rows)
        first = points[torch.arange(len(hit), device=hit.device), hit.int().argmax(1)]
        every = self._moved(rows, (groups & hit[:, :, None]).any(1, keepdim=True))[:, 0]
        new = self._onwards(rows, choose(count > 0, first, rows["at"]), rows["gained"] + (count > 0))
        later = count > 1  # where JOIN decides, nothing moves on yet
        for name in ("cursor", "group", "pass", "gained", "halving", "most", "misled"):
            new[name] = torch.where(later, rows[name], new[name])
        new["phase"] = torch.where(later, JOIN, new["phase"])
        return new | {"join": every}

    def _onwards(self, rows: Rows, at: Tensor, gained: Tensor) -> State:
        """The next groups; after the last of a pass smaller ones, and after a pass of single units in vain halves."""
        left = self._changed(at, rows["x"]).sum(1)
        before = self._changed(rows["at"], rows["x"]).sum(1)
        cursor = rows["cursor"] + self.width * rows["group"] - (before - left)
        over = cursor >= left
        single, vain = rows["group"] == 1, gained == 0
        ended = over & single & vain
        halving = torch.where(ended, 1, rows["halving"])
        group = torch.where(over, (rows["group"] // 2).clamp_min(1), rows["group"])
        group = torch.where(over & single & (halving > 0), self._first_group(left), group)
        finished = ended & (self.pixels | (rows["halving"] > 0))
        done = finished | (left == 0)
        return {
            "at": choose(done, rows["x"], at),
            "cursor": torch.where(over | done, 0, cursor),
            "group": group,
            "pass": rows["pass"] + over,
            "gained": torch.where(over & single, 0, gained),
            "halving": torch.where(done, 0, halving),
            "phase": torch.where(done, SEEK, RESET),
            "most": torch.where(done, 1.0, rows["most"]),
            "misled": torch.where(done, 0, rows["misled"]),
        }


@dataclass(frozen=True, kw_only=True)
class Pointwise(DecisionAttack):
    """Pointwise attack (Schott et al. 2019, arXiv:1805.09190): noise reset value by value, for few changes.

    A greedy search without a promise to come near the smallest perturbation. Departures from the paper, which resets
    one value at a time: groups of values are reset, first large ones and single values last, several side by side; and
    values are bisected in groups too; a budget that is left starts over from other noise. In l0 whole pixels
    are reset, and not bisected, which would not lower their number.

    Attributes:
        width: groups that are asked about in one turn.
    """

    norms: ClassVar[tuple[str, ...]] = ("l0", "l1")
    heuristic: ClassVar[bool] = True
    width: int = 10

    def rule(self, setting: Setting) -> PointwiseRule:
        """See `DecisionAttack.rule`."""
        if self.width < 1:
            raise RobustError(f"width={self.width}: at least 1 group is asked about in a turn")
        return PointwiseRule(setting, self.queries, self.width)
