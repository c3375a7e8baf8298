"""What a privacy ledger's lines say: sealed one to the next, read with nothing guessed low."""

from __future__ import annotations

import hashlib
import json
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from robust.defenses.privacy.accounting import Mechanism, Phase
from robust.defenses.privacy.lock import LedgerError
from robust.errors import ConfigError

VERSION = 1
_FIELDS = ("noise_multiplier", "sample_rate", "sampling", "noise_over", "count_noise")


class Line(NamedTuple):
    """One line: its record, the digest that the next line covers, and its bytes on disk."""

    record: dict[str, Any]
    digest: str
    raw: bytes


def sealed(before: str, kind: str, content: dict[str, Any]) -> Line:
    """A line after the one whose digest is `before`."""
    record = {"kind": kind, **content}
    body = json.dumps(record, ensure_ascii=False)
    digest = hashlib.sha256(f"{before}{body}".encode()).hexdigest()[:16]
    return Line(record, digest, f'{body[:-1]}, "digest": "{digest}"}}\n'.encode())


def _opened(before: str, raw: bytes) -> Line | None:
    """The line of some bytes, or None where they are not what was written."""
    try:
        record = json.loads(raw)
        digest = record.pop("digest")
        line = sealed(before, record.pop("kind"), record)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return line if line.digest == digest else None


HEAD = sealed("", "ledger", {"version": VERSION})
Part = tuple[int, int, Mechanism]


@dataclass
class _Run:
    """The booked steps of a run.

    Attributes:
        parts: (first, end, mechanism), in order and without gaps: what is booked, and what it costs.
        start: the first step of the last booking. It and all before it were about to be taken when they were booked;
            those after it may only have been booked ahead.
    """

    parts: list[Part] = field(default_factory=list)
    start: int = 0

    @property
    def end(self) -> int:
        return self.parts[-1][1] if self.parts else 0

    def cut(self, first: int) -> list[Part]:
        """Takes away the steps from `first` on, and returns them."""
        away: list[Part] = []
        while self.end > first:
            start, end, mechanism = self.parts.pop()
            kept = max(start, first)
            away.append((kept, end, mechanism))
            if kept > start:
                self.parts.append((start, kept, mechanism))
        return away

    def add(self, first: int, count: int, mechanism: Mechanism) -> None:
        """Books steps at the end."""
        if first != self.end or count < 1:
            raise ValueError("steps are booked one after the other")
        if self.parts and self.parts[-1][2] == mechanism:
            self.parts[-1] = (self.parts[-1][0], first + count, mechanism)
        else:
            self.parts.append((first, first + count, mechanism))
        self.start = first


@dataclass
class Book:
    """All that whole lines say.

    Attributes:
        tail: the last digest; size: bytes of the whole lines; runs: their booked steps.
        lost: what counts though no step is known to have been taken for it: blocks that a crash cut short, torn lines.
        torn: what a torn last line counts for, until a line in its place says so; None where the file ends well.
        unended: a last line that is whole but for its line end.
        sampling: the scheme of all that was ever booked, None while nothing was.
    """

    tail: str = ""
    size: int = 0
    runs: dict[str, _Run] = field(default_factory=dict)
    lost: list[Phase] = field(default_factory=list)
    torn: dict[str, Any] | None = None
    unended: Line | None = None
    sampling: str | None = None
    _largest: int = 0

    def run(self, name: str) -> _Run:
        """The booked steps of a run, none where it is new."""
        return self.runs.get(name, _Run())

    def new_name(self) -> str:
        """A name that no run has."""
        number = len(self.runs) + 1
        while f"run-{number}" in self.runs:
            number += 1
        return f"run-{number}"

    def at(self, name: str, step: int) -> Mechanism | None:
        """What a step of a run is booked as, None where it is not."""
        for first, end, mechanism in reversed(self.run(name).parts):
            if first <= step < end:
                return mechanism
        return None

    @property
    def mechanisms(self) -> list[Mechanism]:
        """Every mechanism that was ever booked and counts."""
        booked = [mechanism for run in self.runs.values() for _, _, mechanism in run.parts]
        return booked + [phase.mechanism for phase in self.lost]

    def phases(self, last: str = "") -> list[Phase]:
        """What counts, run by run, and the run `last` at the end."""

        def of(run: _Run) -> list[Phase]:
            return [Phase(mechanism, end - first, fresh=first == 0) for first, end, mechanism in run.parts]

        torn = [Phase(_mechanism(self.torn), self.torn["count"], fresh=True)] if self.torn else []
        others = [phase for name, run in self.runs.items() if name != last for phase in of(run)]
        return [*others, *self.lost, *torn, *of(self.run(last))]

    def costliest(self) -> dict[str, Any]:
        """The most that a line which cannot be read may have booked.

        Nothing where no step is booked yet: then none can have been taken.
        """
        known = self.mechanisms
        if not known:
            return {}
        worst = Mechanism(
            noise_multiplier=min(mechanism.sigma for mechanism in known),
            sample_rate=max(mechanism.sample_rate for mechanism in known), sampling=known[0].sampling,
        )  # fmt: skip
        return {"count": self._largest, **worst.to_dict()}

    def add(self, line: Line) -> None:
        """Takes a whole line in.

        Raises:
            KeyError, TypeError, ValueError, ConfigError: it says what no ledger says.
        """
        record = line.record
        match record["kind"]:
            case "open":
                self.runs.setdefault(record["run"], _Run())
            case "book":
                run = self.runs[record["run"]]
                self.lost += [Phase(m, end - first, fresh=True) for first, end, m in run.cut(record["first"])]
                run.add(record["first"], record["count"], _mechanism(record))
                self._largest = max(self._largest, record["count"])
                self.sampling = self.sampling or run.parts[-1][2].sampling
            case "giveback":
                self.runs[record["run"]].cut(record["first"])
            case "torn":
                self.lost += (
                    [Phase(_mechanism(record), record["count"], fresh=True)] if record.get("count") else []
                )
            case "ledger":
                if record["version"] != VERSION:
                    raise ValueError(f"version {record['version']}")
            case kind:
                raise ValueError(f"unknown kind {kind!r}")
        self.tail, self.size = line.digest, self.size + len(line.raw)


def _mechanism(record: dict[str, Any]) -> Mechanism:
    return Mechanism(**{name: record[name] for name in _FIELDS if name in record})


def read_book(path: Path) -> Book:
    """Reads a ledger. A last line that is cut short is torn; damage anywhere else is an error.

    Raises:
        LedgerError: the file is missing, damaged or no ledger.
    """
    try:
        *texts, rest = path.read_bytes().split(b"\n")
    except OSError as error:
        raise LedgerError(f"{path}: cannot be read: {error.strerror}") from error
    book = Book()
    for number, text in enumerate(texts, 1):
        line = _opened(book.tail, text + b"\n")
        if line is None or (number == 1) != (line.record["kind"] == "ledger"):
            raise LedgerError(_damage(path, number))
        _take(book, line, path, number)
    if not texts and not HEAD.raw.startswith(rest):
        raise LedgerError(_damage(path, 1))
    if rest:
        book.unended = _opened(book.tail, rest + b"\n")
        if book.unended is not None:
            _take(deepcopy(book), book.unended, path, len(texts) + 1)  # it must say what a ledger says
        book.torn = book.costliest() if book.unended is None else None
    return book


def _take(book: Book, line: Line, path: Path, number: int) -> None:
    try:
        book.add(line)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise LedgerError(_damage(path, number)) from error


def _damage(path: Path, number: int) -> str:
    if number == 1:
        return f"{path}: is no privacy ledger of version {VERSION}, or its first line is damaged"
    return (
        f"{path}:{number}: this line is damaged, so what was spent is unknown; restore the file from a copy, or treat "
        "the model as trained without privacy"
    )
