"""The privacy ledger: every step is on disk before it is taken, so that no crash makes the account too small.

A ledger is a text file to which JSON lines are only ever added. A line's digest covers the line before it, so that
damage, edits and missing lines show; it is integrity, no signature. Reading never guesses low: a torn last line,
which a crash in the middle of a booking leaves, counts as a whole block of the costliest step the ledger knows; any
other damage is an error.

A *run* is one sequence of steps 0, 1, 2, … Each opening begins a run of its own, and all runs compose. Only a training
that resumes bit for bit, with the very same draws at every step, may pass its own `run` name: the steps that it repeats
are the release that was booked already, and count once.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from robust.defenses.privacy.accounting import Epsilon, Mechanism, Phase, spent
from robust.defenses.privacy.book import HEAD, Book, Line, read_book, sealed
from robust.defenses.privacy.lock import LedgerError, Lock

__all__ = ["Ledger", "LedgerError", "read_ledger"]


def read_ledger(path: str | Path) -> list[Phase]:
    """What a ledger says was spent, without opening it for booking; blocks booked ahead count in full.

    Raises:
        LedgerError: it is missing, damaged, or no ledger.
    """
    book = read_book(Path(path))
    if book.unended is not None:
        book.add(book.unended)
    return book.phases()


class Ledger:
    """A ledger open for booking, by one process at a time.

    Guarantee: when `book` has returned, the step is on disk (written and flushed), so whatever happens afterwards it
    counts. Steps booked ahead count as spent unless `close` gives them back. Edge cases: a booking that fails (a full
    disk) raises before its step may be taken; a process forked from the owner cannot book.

    Args:
        path: the file; it is made where there is none.
        run: the name of a training that resumes bit for bit, such as a digest of its configuration, data and seed; None
            begins a run that no other continues.
        block: how many steps to book at once. A block is one write and one flush, some milliseconds on a disk; the
            steps within it cost a comparison, and a crash loses its unused rest.

    Raises:
        LedgerError: another process has it open, it is damaged, or it cannot be written.
    """

    def __init__(self, path: str | Path, *, run: str | None = None, block: int = 1) -> None:
        if block < 1:
            raise LedgerError(f"block={block} books nothing; give at least 1")
        self.path, self.block = Path(path), block
        self._owner = os.getpid()
        self._broken = ""
        self._lock = Lock(self.path)
        self._file = -1
        try:
            self._book = self._open()
            self.run = run if run is not None else self._book.new_name()
            self.named = run is not None
            self._since = self._book.run(self.run).end  # what was booked before may not be given back
            self._next = self._reached = 0  # the step after the last one taken here, and after all of them
            if self._book.size == 0:
                self._write(HEAD)
            self._append("open", {"run": self.run})
        except BaseException:
            self._release()
            raise

    def _open(self) -> Book:
        """Reads what there is; a torn last line is replaced, atomically, by one that counts it as spent."""
        known = self.path.exists()
        book = read_book(self.path) if known else Book()
        if book.torn is not None or book.unended is not None:
            self._mend(book)
        try:
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            if not known:
                from robust.digest import flush_folder

                flush_folder(self.path.absolute().parent)
        except OSError as error:
            raise LedgerError(f"{self.path}: cannot be written: {error.strerror}") from error
        return book

    def _mend(self, book: Book) -> None:
        from robust.digest import write_atomic

        whole = self.path.read_bytes()[: book.size]
        line = book.unended or sealed(book.tail, "torn", book.torn or {})
        if not whole and book.unended is None:  # not even the first line was whole
            line = HEAD
        write_atomic(self.path, whole + line.raw)
        book.torn = book.unended = None
        book.add(line)

    def covers(self, mechanism: Mechanism, step: int | None = None) -> bool:
        """Whether a step is booked already: ahead, or by the run that this one repeats.

        Raises:
            LedgerError: the step was taken already in a run that repeats nothing, or as another mechanism, so that this
                run is not the booked one.
        """
        number = self._number(step)
        booked = self._book.at(self.run, number)
        if booked is None or booked == mechanism:
            return booked is not None
        if number > self._book.run(self.run).start and number >= self._reached:
            return False  # booked ahead as another, and so never taken as that
        raise LedgerError(
            f"{self.path}: step {number} of {self.run} was booked as {_short(booked)}, not {_short(mechanism)}; a run "
            "that changed is another run"
        )

    def _number(self, step: int | None) -> int:
        if step is None and self.named:
            raise LedgerError(
                f"{self.path}: {self.run} may repeat steps, so each needs its number; give step="
            )
        number = self._next if step is None else step
        if not self.named and number != self._next:
            raise LedgerError(
                f"{self.path}: step {number} is not the next one, {self._next}; only a run that resumes bit for bit, "
                "and so has a name, may repeat steps"
            )
        return number

    def book(self, mechanism: Mechanism, *, step: int | None = None, most: int | None = None) -> int:
        """Books a step, on disk when it returns; only then may it be taken.

        Args:
            mechanism: the step. step: its number in the run, from 0; only a named run needs it. most: the most steps to
                book at once, where a budget has no room for a whole block.

        Returns:
            How many steps were added to the ledger: 0 where the step was booked already.

        Raises:
            LedgerError: it could not be written, it cannot be composed with what is booked, or its number is not next.
        """
        if os.getpid() != self._owner:
            raise LedgerError(
                f"{self.path}: a forked process cannot book; only the one that opened the ledger can"
            )
        if self._broken or self._file < 0:
            raise LedgerError(f"{self.path}: {self._broken or 'the ledger is closed'}")
        number, count = self._number(step), 0
        if not self.covers(mechanism, number):
            self.give_back()
            end = self._book.run(self.run).end
            if number > end:
                raise LedgerError(
                    f"{self.path}: step {number} of {self.run} cannot be booked; the next one is {end}"
                )
            self._composable(mechanism)
            count = max(1, min(self.block, self.block if most is None else most))
            self._append("book", {"run": self.run, "first": number, "count": count, **mechanism.to_dict()})
        self._next = number + 1
        self._reached = max(self._reached, self._next)
        return count

    def give_back(self) -> None:
        """Takes the steps that this process booked ahead and has not taken off the account."""
        first, end = max(self._reached, self._since), self._book.run(self.run).end
        if end > first:
            self._append("giveback", {"run": self.run, "first": first})

    def _composable(self, mechanism: Mechanism) -> None:
        known = self._book.sampling
        if known not in {None, mechanism.sampling}:
            raise LedgerError(
                f"{self.path}: it accounts for {known} batches; a {mechanism.sampling} step cannot be composed "
                "with them"
            )

    def _append(self, kind: str, content: dict[str, Any]) -> None:
        """One line in one write, flushed; a write that fails is undone where the disk allows it."""
        self._write(sealed(self._book.tail, kind, content))

    def _write(self, line: Line) -> None:
        try:
            written = os.write(self._file, line.raw)
            if written < len(line.raw):  # a disk that fills up takes part of a line
                written += os.write(self._file, line.raw[written:])
            if written < len(line.raw):
                raise OSError(28, "No space left on device")
            _flush(self._file)
        except OSError as error:
            self._undo(error)
            raise LedgerError(
                f"{self.path}: the step could not be booked, so it must not be taken: {error.strerror}"
            ) from error
        self._book.add(line)

    def _undo(self, error: OSError) -> None:
        """Cuts off what a failed write left; where that fails too, the ledger stays shut, and the rest is torn."""
        try:
            os.ftruncate(self._file, self._book.size)
            os.fsync(self._file)
        except OSError:
            self._broken = f"an earlier booking failed ({error.strerror}); open the ledger again"

    def phases(self) -> list[Phase]:
        """All that is booked, run by run, and the open one last."""
        return self._book.phases(self.run)

    @property
    def begun(self) -> bool:
        """Whether the open run has a step booked."""
        return self._book.run(self.run).end > 0

    def spent(self, *, delta: float, accountant: str = "pld") -> Epsilon:
        """The epsilon of all that is booked."""
        return spent(self.phases(), delta=delta, accountant=accountant)

    def close(self) -> None:
        """Gives back the steps that were booked ahead and not taken, and lets the next process in."""
        if self._file >= 0 and os.getpid() == self._owner and not self._broken:
            with suppress(LedgerError):  # what cannot be given back is spent
                self.give_back()
        self._release()

    def _release(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        self._lock.release()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# The size of the file is flushed too, where it is needed to read what was written.
_flush = getattr(os, "fdatasync", os.fsync)


def _short(mechanism: Mechanism) -> str:
    return json.dumps(mechanism.to_dict())
