"""AutoAttack: the parameter-free ensemble (Croce & Hein 2020, arXiv:2003.01690)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from robust.attacks.base import Attack, Until
from robust.attacks.trial import Trial
from robust.registry import room
from robust.suites import stages


@dataclass(frozen=True, kw_only=True)
class AutoAttack(Attack):
    """AutoAttack (Croce & Hein 2020, arXiv:2003.01690): APGD-CE, APGD-T, FAB-T and Square, each on what is left.

    Attributes:
        version: a suite of `robust.suites`: "standard", "rand" or "quick".
    """

    until: Until = "broken"
    version: str = "standard"

    @classmethod
    def passes(cls, **chosen: Any) -> float:
        """See `Attack.passes`; of the linf suite."""
        return sum(stage.passes() for stage in stages(chosen.get("version", "standard"), "linf")[1])

    def attack(self, trial: Trial) -> None:
        """See `Attack.attack`."""
        for stage in stages(self.version, self.threat.norm)[1]:
            rows = (~trial.finished()).nonzero()[:, 0]
            if len(rows) == 0:
                return
            kind = room("attacks").load(stage.attack)
            member: Attack = kind(threat=self.threat.take(rows), until=self.until, **stage.params)
            part = trial.part(member, rows)
            member.attack(part)
            trial.absorb(rows, part)
