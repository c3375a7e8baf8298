"""One process at a time: a lock beside a file, which ends with the process that holds it, however it ends."""

from __future__ import annotations

import os
from pathlib import Path

from robust.errors import RunError

_HELD: set[Path] = set()  # a process's own locks do not keep the process itself out


class LedgerError(RunError):
    """A ledger that cannot be opened, read, believed or written."""


class Lock:
    """An exclusive lock for `path`, on the file ``path.lock`` beside it.

    It belongs to the process: a forked worker that outlives its parent does not hold it.

    Raises:
        LedgerError: somebody holds it, or it cannot be made.
    """

    def __init__(self, path: Path) -> None:
        import fcntl  # POSIX only

        self._descriptor = -1
        self._path = path.absolute().resolve()
        busy = f"{path}: in use by another process; wait for it to end, or give this training a ledger of its own"
        if self._path in _HELD:
            raise LedgerError(busy.replace("another", "this"))
        try:
            self._descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            held = self._descriptor >= 0
            self._close()
            raise LedgerError(busy if held else f"{path}: cannot be locked: {error.strerror}") from error
        except OSError as error:
            self._close()
            raise LedgerError(f"{path}: cannot be locked: {error.strerror}") from error
        _HELD.add(self._path)

    def release(self) -> None:
        """Lets the next one in."""
        if self._descriptor >= 0:
            self._close()
            _HELD.discard(self._path)

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
