"""Costs as first-class results: what a verdict took in model passes, queries and seconds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class Cost:
    """Counts in samples (a forward of a batch of 32 counts 32), and wall-clock seconds.

    Attributes:
        forwards: samples passed forward, padding left out.
        backwards: samples whose input gradient was taken.
        queries: answers of the original model to a black-box attack.
        seconds: wall-clock time.
    """

    forwards: int = 0
    backwards: int = 0
    queries: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Cost)))

    def to_dict(self) -> dict[str, float]:
        """The counts by name, for JSON."""
        return asdict(self)
