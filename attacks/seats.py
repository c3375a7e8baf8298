"""The rows of a batch: jobs take seats and leave them, and the batch shrinks when no job waits."""

from __future__ import annotations

import torch
from torch import Tensor

from robust.attacks.rule import Jobs, Rule, State
from robust.attacks.trial import Trial
from robust.rng import identities


class Seats:
    """Row-indexed state of a fixed number of rows, refilled from a queue.

    Attributes:
        state: the rows' tensors, on the model's device.
        active: (B,) bool on the CPU: rows that a job sits on; the others pad the batch.
        clock: (B,) on the CPU: turns since each row was seated.
        finished: jobs that are done or were not needed.
    """

    def __init__(self, rule: Rule, trial: Trial, jobs: Jobs, sizes: list[int]) -> None:
        self.rule, self.trial, self.jobs, self.sizes = rule, trial, jobs, sizes
        self.waiting = jobs.row.tolist()
        self.aimed = bool((jobs.target >= 0).all())
        self.state: State = {}
        self.active = torch.zeros(0, dtype=torch.bool)
        self.clock = torch.zeros(0, dtype=torch.long)
        self.next = self.finished = 0

    def __len__(self) -> int:
        return len(self.waiting)

    def fill(self) -> bool:
        """Gives free seats new jobs, shrinks the batch when the queue is empty; whether any row is active."""
        busy = int(self.active.sum())
        free = (len(self.active) if self.state else self.sizes[0]) - busy
        taken = self._take(free) if free and self.next < len(self.waiting) else []
        if not busy and not taken:
            return False
        if taken:
            self._seat(torch.tensor(taken, device=self.jobs.row.device))
        elif self.next >= len(self.waiting):
            self._shrink(busy)
        return True

    def leave(self, over: Tensor) -> None:
        """Frees the seats of the rows `over` (B,), and those of samples that need no work any more."""
        self.active &= ~over
        cancelled = self.trial.finished()[self.state["row"]].cpu() & self.active
        self.active &= ~cancelled
        self.finished += int(over.sum()) + int(cancelled.sum())

    def _take(self, count: int) -> list[int]:
        """The next jobs whose samples still need work."""
        finished = self.trial.finished().tolist()
        taken: list[int] = []
        while self.next < len(self.waiting) and len(taken) < count:
            if not finished[self.waiting[self.next]]:
                taken.append(self.next)
            else:
                self.finished += 1
            self.next += 1
        return taken

    def _seat(self, taken: Tensor) -> None:
        new = self._rows(self.jobs.take(taken))
        own = self.rule.start(new)
        assert not own.keys() & new.keys(), "a rule's entries must not hide the engine's"
        new.update(own)
        if not self.state:
            size = next(size for size in reversed(self.sizes) if size >= len(taken))
            order = torch.arange(size, device=taken.device).clamp_max(len(taken) - 1)
            self.state = {name: value[order].clone() for name, value in new.items()}
            self.active = torch.arange(size) < len(taken)
            self.clock = torch.zeros(size, dtype=torch.long)
            return
        slots = (~self.active).nonzero()[: len(taken), 0]
        for name, value in new.items():
            self.state[name][slots.to(value.device)] = value
        self.active[slots], self.clock[slots] = True, 0

    def _rows(self, jobs: Jobs) -> State:
        trial, rows = self.trial, jobs.row
        index = trial.index.to(trial.x.device)[rows]
        state = {
            "row": rows,
            "x": trial.x[rows],
            "y": trial.y[rows],
            "identity": identities(index, jobs.number),
            "hit": torch.zeros(len(rows), dtype=torch.bool, device=rows.device),
            "sure": torch.zeros(len(rows), dtype=torch.bool, device=rows.device),
            "score": torch.full((len(rows),), -torch.inf, device=rows.device),
            "best": trial.x[rows],
            "first": torch.full((len(rows),), torch.nan, device=rows.device),
            "spent": torch.zeros(len(rows), dtype=torch.long, device=rows.device),
        }
        if trial.track is not None:
            state["noted"] = torch.full((len(rows),), -1.0, dtype=torch.float64, device=rows.device)
        for name, values in (("mask", trial.mask), ("begin", trial.begin)):
            if values is not None:
                state[name] = values[rows]
        if self.aimed:
            state["target"] = jobs.target
        eps = trial.threat.take(rows).eps
        if isinstance(eps, Tensor) and eps.dim():
            state["eps"] = eps.to(trial.x)
        if self.rule.needs_reference:
            state["reference"] = trial.clean[rows]
        return state

    def _shrink(self, busy: int) -> None:
        """Moves the last rows into the smallest batch that holds them."""
        size = next((size for size in reversed(self.sizes) if size >= busy), self.sizes[0])
        if size >= len(self.active):
            return
        order = torch.argsort(~self.active, stable=True)[:size]
        self.state = {name: value[order.to(value.device)] for name, value in self.state.items()}
        self.active, self.clock = self.active[order], self.clock[order]
