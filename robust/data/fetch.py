"""Downloads through torchvision: into a folder beside the final one, whose files then move there."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from robust.errors import DataError


def one_line(error: BaseException) -> str:
    """An exception's text on one line, of a bearable length; its type where it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."


def download(name: str, fetch: Callable[[str], Any], folder: str, root: Path, expected: str) -> None:
    """Fetch a data set into `root`; where that fails, nothing is left there.

    Args:
        name: the data's name, for the error.
        fetch: downloads into the folder it is given, creating `folder` there.
        folder: the sub-folder that holds the data afterwards.
        root: where `folder` belongs.
        expected: the files that would have been read instead, for the error.
    """
    made = [path for path in (root, *root.parents) if not path.exists()]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".download-") as staging:
            # torchvision talks on stdout, where --json wants nothing but its object
            with contextlib.redirect_stdout(sys.stderr):
                fetch(staging)
            (root / folder).mkdir(parents=True, exist_ok=True)
            for path in Path(staging, folder).iterdir():
                os.replace(path, root / folder / path.name)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise DataError(
            f"{name} is not in {root} and could not be downloaded ({one_line(error)}); "
            f"expected there: {expected}; another folder is given as the data root or by ROBUST_DATA"
        ) from None
