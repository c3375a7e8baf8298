"""Small files that the data tests read: images, IDX arrays, and an object that must never be unpickled."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from robust.data import load_data
from robust.errors import RobustError
from robust.models import load_model

Pixels = NDArray[np.uint8]


def picture(value: int, size: tuple[int, ...] = (6, 5, 3)) -> Pixels:
    """An image of noise that `value` determines."""
    return np.random.default_rng(value).integers(0, 256, size).astype(np.uint8)


def save(path: Path, value: int, size: tuple[int, ...] = (6, 5, 3), **options: Any) -> Pixels:
    """A lossless image file, and its pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture(value, size)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def folder(root: Path, counts: dict[str, int], suffix: str = "png") -> Path:
    """An image folder with `counts[name]` files per class; the pixels say class and place."""
    for place, (name, count) in enumerate(counts.items()):
        for number in range(count):
            save(root / name / f"{number:03}.{suffix}", 100 * place + number)
    return root


def fails(match: str, spec: str, *, load: Callable[..., object] = load_data, **options: object) -> None:
    """The spec gives one line that says `match`, and no traceback of another kind."""
    with pytest.raises(RobustError) as caught:
        load(spec, **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 600
    assert re.search(match, line), line


def fails_model(match: str, spec: str, **options: object) -> None:
    """As `fails`, for a model's spec."""
    fails(match, spec, load=load_model, **options)


def idx(array: Pixels) -> bytes:
    """The array as an IDX file of unsigned bytes."""
    header = bytes((0, 0, 8, array.ndim)) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


class Trap:
    """An object whose unpickling makes the folder `flag`."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.flag),)
