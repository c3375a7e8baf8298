"""What labelled images are to everybody else: indexable, read when asked for, float32 in [0, 1]."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust.errors import DataError

LARGEST_LABEL = 99_999


@dataclass(frozen=True)
class Request:
    """What was asked for: the path behind the spec's colon, the folder of the named data sets, and the part."""

    source: str
    root: Path
    train: bool

    @property
    def part(self) -> str:
        """The part's name: "train" or "test"."""
        return "train" if self.train else "test"


class Images(Protocol):
    """A sequence of images of one shape, wherever they lie."""

    def __len__(self) -> int:
        """How many images there are."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images of the given rows, (len(rows), C, H, W) float32 in [0, 1]."""

    def select(self, rows: Sequence[int]) -> Images:
        """The images of the given rows only, in that order."""

    def probe(self) -> None:
        """Look at what can be looked at cheaply, and raise `DataError` for what later reads would stumble over."""


class ArrayImages:
    """Images held in memory as one array.

    Args:
        array: (N, C, H, W), either uint8, which stands for value / 255, or floating point in [0, 1].
    """

    def __init__(self, array: NDArray[Any]) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.array.shape[1:]
        return channels, height, width

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images of the given rows, (len(rows), C, H, W) float32 in [0, 1]."""
        return to_unit(self.array[np.asarray(rows, dtype=np.int64)])

    def select(self, rows: Sequence[int]) -> ArrayImages:
        """The images of the given rows only, in that order."""
        return ArrayImages(self.array[np.asarray(rows, dtype=np.int64)])

    def probe(self) -> None:
        """Nothing to look for: an array was checked when it was loaded."""


@dataclass(frozen=True, eq=False)
class Data:
    """Labelled images, indexable; nothing is read before it is asked for.

    Attributes:
        name: the data's name, or its kind and file name.
        classes: the classes' names; a label is an index into them.
        images: where the images come from.
        labels: (N,) int64.
        part: "train" or "test" of a named data set, "all" of a user's own files.
    """

    name: str
    classes: tuple[str, ...]
    images: Images
    labels: Tensor
    part: str = "all"

    def __post_init__(self) -> None:
        if len(self.labels) != len(self.images):
            raise DataError(f"{self.name} has {len(self.images)} images and {len(self.labels)} labels")
        if not len(self.labels):
            raise DataError(f"{self.name} has no images")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Data({self.name!r}, part={self.part!r}, n={len(self)}, classes={len(self.classes)})"

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        [number] = self._rows([row])
        return self.images.read([number])[0], int(self.labels[number])

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[row] for row in range(len(self)))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        return self.images.shape

    def batch(self, rows: Iterable[int] | slice) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W) float32 in [0, 1] and labels (n,) int64 of the given rows."""
        numbers = self._rows(rows)
        if not numbers:
            return torch.empty(0, *self.shape), torch.empty(0, dtype=torch.int64)
        return self.images.read(numbers), self.labels[torch.tensor(numbers)]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images and labels at once."""
        return self.batch(slice(None))

    def subset(self, rows: Iterable[int] | slice) -> Data:
        """The given rows as data of their own, in that order."""
        numbers = self._rows(rows)
        labels = self.labels[torch.tensor(numbers, dtype=torch.int64)]
        return replace(self, images=self.images.select(numbers), labels=labels)

    def _rows(self, rows: Iterable[int] | slice) -> list[int]:
        """Row numbers from 0 to N - 1; negative ones count from the end, as everywhere in Python."""
        total = len(self)
        if isinstance(rows, slice):
            return list(range(*rows.indices(total)))
        numbers = [operator.index(row) for row in rows]
        for number in numbers:
            if not -total <= number < total:
                raise IndexError(f"row {number} of {self.name}, which has {total}")
        return [number % total for number in numbers]


def to_unit(array: NDArray[Any]) -> Tensor:
    """float32 in [0, 1]: uint8 divided by 255 in float32 (as torchvision does), floating point as it is."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.to(torch.float32) / 255 if tensor.dtype == torch.uint8 else tensor.to(torch.float32)


def check_labels(values: NDArray[Any], where: str, classes: int | None = None) -> Tensor:
    """Whole, in-range labels as (N,) int64.

    Args:
        values: (N,) of any integer type, or floats that are whole numbers.
        where: what an error calls them.
        classes: how many classes there are, where that is known.
    """
    if values.ndim != 1:
        raise DataError(f"{where} has shape {values.shape}; labels have the shape (N,)")
    if values.dtype.kind not in "iuf":
        raise DataError(f"{where} is {values.dtype}; labels are whole numbers from 0 on")
    top = LARGEST_LABEL if classes is None else classes - 1
    with np.errstate(invalid="ignore"):
        wrong = ~((values >= 0) & (values <= top) & (values == np.floor(values)))
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{where} has the label {values[row]:g} in row {row}; expected a whole number from 0 to {top}"
        )
    return torch.from_numpy(values.astype(np.int64))


def round_robin(labels: Sequence[int]) -> list[int]:
    """Rows in turn over the classes: the first of each class, then the second of each; short classes run out."""
    seen: dict[int, int] = {}
    keys = []
    for row, label in enumerate(labels):
        seen[label] = seen.get(label, -1) + 1
        keys.append((seen[label], label, row))
    return [row for _, _, row in sorted(keys)]
