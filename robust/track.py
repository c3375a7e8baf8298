"""What an attack did step by step: losses, gradients and predictions, and curves of success against queries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

COLUMNS = ("sample", "job", "step", "queries", "loss", "gradient_norm", "prediction", "success", "distance")


TrackMode = Literal["steps", "best"]


@dataclass
class Track:
    """One entry per row and turn of the engine, in the order of time; see `table`.

    Attributes:
        mode: "steps": every turn; "best": only where a job's best point became better.
    """

    mode: TrackMode = "steps"
    parts: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, **columns: Tensor) -> None:
        """Entries of one turn, (B,) each."""
        self.parts.append({name: value.detach().cpu() for name, value in columns.items()})

    def take(self, other: Track, rows: Tensor) -> None:
        """The entries of another track, whose sample k is this one's sample rows[k]."""
        places = rows.cpu()
        self.parts += [{**part, "sample": places[part["sample"]]} for part in other.parts]

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
        """See `Curves.against_queries`."""
        curves = Curves()
        curves.add(self)
        return curves.against_queries(at, n)


@dataclass
class Curves:
    """What attackers with so many queries a sample reach, over the tracks of several runs.

    A sample that is adversarial from the start is no part of them.
    """

    parts: list[dict[str, Tensor]] = field(default_factory=list)
    samples: int = 0

    def add(self, track: Track) -> None:
        """The successes of one run."""
        table = track.table()
        hits = table["success"] > 0
        if bool(hits.any()):
            part = {name: table[name][hits].double() for name in ("sample", "queries", "distance")}
            part["sample"] += self.samples
            self.parts.append(part)
        self.samples += 1 + int(table["sample"].max()) if len(table["sample"]) else 0

    def against_queries(self, at: Sequence[int], n: int) -> dict[str, list[float]]:
        """What an attacker with so many queries a sample has reached.

        Args:
            at: ascending numbers of queries; n: how many samples the attack had to break.

        Returns:
            `queries`, `success` (fraction of n) and `distance` (median of the best distances, a sample without
            success counting as infinite), one per entry of `at`.
        """
        names = ("sample", "queries", "distance")
        empty = torch.zeros(0, dtype=torch.float64)
        sample, queries, distance = (
            torch.cat([empty, *(part[name] for part in self.parts)]) for name in names
        )
        best = torch.full((self.samples,), torch.inf, dtype=torch.float64)
        success, median = [], []
        for limit in at:
            within = queries <= limit
            best.scatter_reduce_(0, sample[within].long(), distance[within], "amin")
            reached = best[best.isfinite()]
            missing = torch.full((max(n - len(reached), 0),), torch.inf, dtype=torch.float64)
            success.append(len(reached) / max(n, 1))
            median.append(float(torch.cat([reached, missing]).median()) if n else float("inf"))
        return {"queries": [float(q) for q in at], "success": success, "distance": median}
