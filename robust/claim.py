"""One process at a time in a run's folder."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from robust.errors import RunError

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def claimed(folder: str | Path | None) -> Iterator[None]:
    """Keeps everybody else out of `folder` while the body runs.

    The folder is made, with those above it, and what stays empty of them is removed again. The lock lies on the folder
    itself and leaves no file; it ends with the process, however that ends. Where folders cannot be locked (Windows,
    some network file systems) nobody is kept out, and a folder that cannot be made is left to the body to complain
    about.

    Raises:
        RunError: somebody else, in this process or another, is at work in it.
    """
    descriptor, made = -1, list[Path]()
    if folder is not None:
        path = Path(folder)
        with suppress(OSError):
            made = [place for place in (path, *path.parents) if not place.exists()]
            path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY)
    try:
        if folder is not None and descriptor >= 0 and not _locked(descriptor):
            raise RunError(f"{folder} is in use by another run; wait for it to end, or choose another folder")
        yield
    finally:
        if descriptor >= 0:
            os.close(descriptor)
        with suppress(OSError):
            for place in made:  # upwards, until one holds something
                place.rmdir()


def claiming(call: Callable[P, R]) -> Callable[P, R]:
    """A function whose argument `out` is a run's folder or None, alone in that folder while it runs."""
    signature = inspect.signature(call)

    @wraps(call)
    def alone(*positional: P.args, **named: P.kwargs) -> R:
        with claimed(signature.bind(*positional, **named).arguments.get("out")):
            return call(*positional, **named)

    return alone


def _locked(descriptor: int) -> bool:
    """Whether the lock is ours now, or there are no locks here."""
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
