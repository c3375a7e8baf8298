"""The monitor: says before a step whether it still fits the budget, and stops the training in time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from robust.defenses.privacy.accounting import Epsilon, Mechanism, Phase, PhaseLike
from robust.defenses.privacy.calibrate import Budget, least_private, require_served
from robust.defenses.privacy.ledger import Ledger
from robust.errors import RobustError

DISTINCT = 8  # different mechanisms that are watched as they are


class BudgetSpent(RobustError):
    """The next step would exceed the privacy budget; it was neither booked nor may it be taken."""


class Monitor:
    """Counts steps against an (epsilon, delta), and refuses the first that would exceed it.

    Guarantee: the steps taken through it, with those spent before and those of its ledger, cost at most the budget by
    its accountant, or by RDP, whose bound holds as well and is asked first because it is cheap. Whole blocks of steps
    are evaluated ahead: a step within one costs a comparison, and near the end the block shrinks to the exact last
    step. A noise that changes at every step is watched on a grid of one percent, rounded down.

    Args:
        budget: what to keep.
        before: what was spent already on the same data, outside the ledger.
        ledger: books every step on disk before `take` returns, and knows what earlier runs spent.
    """

    def __init__(
        self, budget: Budget, *, before: Iterable[PhaseLike] = (), ledger: Ledger | None = None
    ) -> None:
        self.budget = budget
        self.ledger = ledger
        self._phases = [Phase(*phase) for phase in before]
        self._own: list[Phase] = []
        self._room: tuple[Mechanism | None, int] = (None, 0)
        self._look = self._first = 64 if ledger is None else max(64, ledger.block)
        self._seen: set[Mechanism] = set()
        require_served(budget.accountant, self.phases)

    @property
    def phases(self) -> list[Phase]:
        """All that counts against the budget: spent before, and in the ledger or taken here."""
        return [*self._phases, *(self._own if self.ledger is None else self.ledger.phases())]

    @property
    def spent(self) -> Epsilon:
        """The epsilon of all that counts so far."""
        return self.budget.cost(self.phases)

    @property
    def _begun(self) -> bool:
        """Whether this training has taken a step: the next one then goes on with its epoch."""
        return bool(self._own) if self.ledger is None else self.ledger.begun

    def fits(self, mechanism: Mechanism, count: int = 1) -> bool:
        """Whether `count` more steps keep the budget."""
        return self._ahead(mechanism, count) >= count

    def remaining(self, mechanism: Mechanism) -> int:
        """How many steps of a mechanism are left: exact, and as dear as a calibration."""
        phases = self.phases
        require_served(self.budget.accountant, [*phases, (mechanism, 0)])

        def excess(count: float) -> float:
            return self.budget.excess([*phases, Phase(mechanism, int(count), fresh=not self._begun)])

        return int(least_private(excess, "steps", max(64, self._room[1])))

    def take(self, mechanism: Mechanism, *, step: int | None = None) -> None:
        """Books one step; only when this has returned may it be taken.

        Args:
            mechanism: the step. step: its number in the ledger's run; a step that a resumed run repeats is booked
                already and costs nothing (see `Ledger`).

        Raises:
            BudgetSpent: it does not fit. LedgerError: it cannot be booked.
        """
        if self.ledger is not None and self.ledger.covers(mechanism, step):
            self.ledger.book(mechanism, step=step)
            return
        if self.ledger is not None:
            self.ledger.give_back()
        room = self._ahead(mechanism, 1)
        if room < 1:
            raise BudgetSpent(
                f"the next step would exceed epsilon {self.budget.epsilon:g} at delta {self.budget.delta:g}; "
                f"{float(self.spent):.4g} is spent"
            )
        if self.ledger is None:
            booked = 1
            self._count(mechanism)
        else:
            booked = self.ledger.book(mechanism, step=step, most=room)
        self._room = (self._room[0], room - booked)

    def _count(self, mechanism: Mechanism) -> None:
        if self._own and self._own[-1].mechanism == mechanism:
            self._own[-1] = self._own[-1]._replace(steps=self._own[-1].steps + 1)
        else:
            self._own.append(Phase(mechanism, 1, fresh=not self._own))

    def _ahead(self, mechanism: Mechanism, count: int) -> int:
        """Steps of a mechanism that are known to fit from here: at least `count`, or as many as there are."""
        watched = self._watched(mechanism)
        known, room = self._room
        if known == watched and room >= count:
            return room
        phases = self.phases
        require_served(self.budget.accountant, [*phases, (mechanism, 0)])
        # The block doubles while one mechanism goes on, so that evaluations grow with the logarithm of the steps.
        self._look = max(count, 2 * self._look if known == watched else self._first)
        room, beyond = 0, self._look + 1
        trial = self._look
        while beyond - room > 1:
            fits = self._keeps([*phases, Phase(watched, trial, fresh=not self._begun)])
            room, beyond = (trial, beyond) if fits else (room, trial)
            trial = (room + beyond) // 2
        self._room, self._look = (watched, room), max(room, count)
        return room

    def _keeps(self, phases: list[Phase]) -> bool:
        cheap = replace(self.budget, accountant="rdp")
        return cheap.keeps(phases) or (self.budget.accountant != "rdp" and self.budget.keeps(phases))

    def _watched(self, mechanism: Mechanism) -> Mechanism:
        """The mechanism, or, once there were many, one with a rounded noise that stands for its neighbours too."""
        if mechanism in self._seen or len(self._seen) < DISTINCT:
            self._seen.add(mechanism)
            return mechanism
        if not 0 < mechanism.sigma < math.inf:
            return mechanism
        low = math.exp(math.floor(math.log(mechanism.sigma) * 100) / 100)
        return replace(mechanism, noise_multiplier=low, noise_over="sensitivity", count_noise=None)
