"""TensorBoard: a training's history as scalars, where the package is installed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust.errors import RunError


class Board:
    """Writes one training's numbers below `folder`; a resumed training goes on where it stood.

    Args:
        folder: for event files, of which each start of a training adds one.
        step: of the first number to come: later ones of an earlier start are struck.

    Raises:
        RunError: tensorboard is not installed.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise RunError(
                "tensorboard is not installed; pip install 'robust-toolkit[tensorboard]'"
            ) from None
        self.writer: Any = SummaryWriter(str(folder), purge_step=step)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Scalars at a step; they are on the disk afterwards."""
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self.writer.close()
