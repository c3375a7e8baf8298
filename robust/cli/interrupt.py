"""Runs that can be stopped: where they are kept, and what a command says that its user stopped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from robust.errors import RobustError

Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="RUN", help="The run folder; none keeps nothing.", show_default=False),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")]
ResumeMore = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run, or add attacks to it.")
]


class Interrupted(RobustError):
    """The user stopped a command."""

    exit_code = 130


@contextmanager
def resumable(out: Path | None) -> Iterator[None]:
    """Turns the keyboard's interrupt of a run into one line: how it goes on in `out`, or that nothing is kept."""
    try:
        yield
    except KeyboardInterrupt:
        where = (
            f"the same command with --resume --out {out} goes on where it was" if out else "nothing is kept"
        )
        raise Interrupted(f"stopped; {where}") from None
