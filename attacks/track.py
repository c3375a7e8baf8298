"""What an attack did step by step: losses, gradients and predictions, and curves of success against queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

COLUMNS = ("sample", "job", "step", "queries", "loss", "gradient_norm", "prediction", "success", "distance")


@dataclass
class Track:
    """One entry per row and turn of the engine, in the order of time; see `table`."""

    parts: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, **columns: Tensor) -> None:
        """Entries of one turn, (B,) each."""
        self.parts.append({name: value.detach().cpu() for name, value in columns.items()})

    def table(self) -> dict[str, Tensor]:
        """(M,) tensors by name.

        `sample` position in x; `job` restart or target of the sample; `step` the job's own; `queries` points asked by
        the job; `loss` and `gradient_norm` (l2) at the step's point, NaN where none was asked for; `prediction` there;
        `success` and `distance` of the job's best point so far (distance in the threat's norm, infinite before one).
        """
        if not self.parts:
            return {name: torch.zeros(0) for name in COLUMNS}
        return {name: torch.cat([part[name] for part in self.parts]) for name in COLUMNS}

    def against_queries(self, at: Sequence[int], n: int) -> dict[str, list[float]]:
        """What an attacker with so many queries a sample has reached.

        Args:
            at: numbers of queries; n: how many samples the attack had to break.

        Returns:
            `queries`, `success` (fraction of n) and `distance` (median of the best distances, a sample without
            success counting as infinite), one per entry of `at`.
        """
        table = self.table()
        best = torch.full(
            (int(table["sample"].max()) + 1 if len(table["sample"]) else 0,), torch.inf
        ).double()
        order = table["queries"].argsort(stable=True)
        queries, sample = table["queries"][order], table["sample"][order].long()
        distance = torch.where(table["success"][order] > 0, table["distance"][order].double(), torch.inf)
        success, median, start = [], [], 0
        for limit in at:
            stop = int((queries <= limit).sum())
            best.scatter_reduce_(0, sample[start:stop], distance[start:stop], "amin")
            start = stop
            reached = best[best.isfinite()]
            padded = torch.cat([reached, torch.full((max(n - len(reached), 0),), torch.inf).double()])
            success.append(len(reached) / max(n, 1))
            median.append(
                float(padded.sort().values[(len(padded) - 1) // 2]) if len(padded) else float("inf")
            )
        return {"queries": [float(q) for q in at], "success": success, "distance": median}
