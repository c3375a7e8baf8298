"""Progress of a long run on standard error: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress

QUIET_SECONDS = 20.0  # between two lines where there is no terminal


class Meter:
    """What a run calls with its progress; a context manager that leaves standard output alone.

    Args:
        title: what is being done.
        quiet: show nothing at all.
    """

    def __init__(self, title: str, *, quiet: bool = False) -> None:
        self.title, self.quiet = title, quiet
        self.clock = Clock()
        self._bar: Progress | None = None
        self._said = time.monotonic()

    def __enter__(self) -> Self:
        if not self.quiet and sys.stderr.isatty():
            self._bar = _bar(self.clock)
            self._bar.add_task(self.title, total=1.0)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: float, text: str = "") -> None:
        """Show that the fraction `done` of the work is behind us, and what is going on."""
        self.clock.tell(done)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done, description=text or self.title)
        elif not self.quiet and time.monotonic() - self._said >= QUIET_SECONDS:
            self._said = time.monotonic()
            print(f"{done:4.0%}  {text or self.title}, {self.clock.left()} left", file=sys.stderr, flush=True)


class Clock:
    """Estimates the time left from the pace since the first report, so that a resumed run's head start is no pace."""

    def __init__(self) -> None:
        self._first: tuple[float, float] | None = None
        self._last = (0.0, 0.0)

    def tell(self, done: float, now: float | None = None) -> None:
        """Note that the fraction `done` is reached at the monotonic time `now`."""
        self._last = (time.monotonic() if now is None else now, done)
        self._first = self._first or self._last

    def seconds(self, now: float | None = None) -> float | None:
        """Seconds left, None while there is no pace to judge by."""
        if self._first is None or self._last[1] <= self._first[1]:
            return None
        pace = (self._last[0] - self._first[0]) / (self._last[1] - self._first[1])
        since = (time.monotonic() if now is None else now) - self._last[0]
        return max(pace * (1 - self._last[1]) - since, 0.0)

    def left(self) -> str:
        """The time left as people read it."""
        seconds = self.seconds()
        return "unknown time" if seconds is None else duration(seconds)


def duration(seconds: float) -> str:
    """Seconds as ``41 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _bar(clock: Clock) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Left(ProgressColumn):
        """The clock's estimate."""

        def render(self, task: object) -> Text:
            return Text(f"{clock.left()} left", style="cyan")

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        Left(),
    )
    return Progress(*columns, console=console, transient=True)
