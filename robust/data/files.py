"""Image files on disk: a folder per class, or a CSV table of paths and labels; decoded when they are asked for."""

from __future__ import annotations

import csv
import io
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from robust.data.base import Data, Request, check_labels, round_robin, to_unit
from robust.data.fetch import one_line
from robust.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

PROBED = 10_000  # headers looked at before work starts: about a second
GREY = ("1", "L")
BYTES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "La", "CMYK", "YCbCr", "LAB", "HSV")
# What Pillow's decoders raise for damaged files; IndexError and KeyError are LookupErrors.
BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error)


class EncodedImages:
    """Encoded image files (anything Pillow reads), decoded one by one when they are read.

    The first file decides what all must be: its size, and one channel if it is grey, else three.

    Args:
        names: the files' paths, or names that an error can show.
        contents: the files' bytes, where they are held in memory.
    """

    def __init__(self, names: Sequence[str], contents: Sequence[bytes] | None = None) -> None:
        self.names = names
        self.contents = contents
        self._shape: tuple[int, int, int] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width: the first file's."""
        if self._shape is None:
            self._shape = self._header(0)
        return self._shape

    def read(self, rows: Sequence[int]) -> Tensor:
        """Images of the given rows, (len(rows), C, H, W) float32 in [0, 1]."""
        return torch.stack([to_unit(self._pixels(row)) for row in rows])

    def select(self, rows: Sequence[int]) -> EncodedImages:
        """The images of the given rows only, in that order; the shape stays that of the whole."""
        contents = None if self.contents is None else [self.contents[row] for row in rows]
        chosen = EncodedImages([self.names[row] for row in rows], contents)
        chosen._shape = self._shape
        return chosen

    def probe(self) -> None:
        """Compare the headers of the first 10,000 files with the first file's, so that a long run does not stumble."""
        for row in range(min(len(self), PROBED)):
            self._check(row, self._header(row))

    def _header(self, row: int) -> tuple[int, int, int]:
        with self._open(row) as image:
            return 1 if image.mode in GREY else 3, image.height, image.width

    def _pixels(self, row: int) -> NDArray[Any]:
        """(C, H, W) uint8."""
        channels, height, width = self.shape
        with self._open(row) as image:
            self._check(row, (1 if image.mode in GREY else 3, image.height, image.width))
            try:
                pixels = np.array(image.convert("L" if channels == 1 else "RGB"))
            except BROKEN as error:
                raise DataError(f"{self.names[row]} is a damaged image: {one_line(error)}") from None
        return pixels.reshape(height, width, channels).transpose(2, 0, 1)

    def _check(self, row: int, shape: tuple[int, int, int]) -> None:
        channels, height, width = self.shape
        if shape[1:] != (height, width):
            raise DataError(
                f"{self.names[row]} is {shape[2]}x{shape[1]} pixels, {self.names[0]} is {width}x{height}; "
                "all images must share one size"
            )
        if shape[0] > channels:
            raise DataError(
                f"{self.names[row]} has colours, {self.names[0]} has none; all images must have the same channels"
            )

    def _open(self, row: int) -> Image:
        """The image, its header read; its pixels must have 8 bits."""
        from PIL import Image

        name = self.names[row]
        try:
            image = Image.open(name if self.contents is None else io.BytesIO(self.contents[row]))
        except FileNotFoundError:
            raise DataError(f"{name} does not exist") from None
        except (*BROKEN, Image.DecompressionBombError) as error:
            raise DataError(f"{name} is not an image that Pillow can read: {one_line(error)}") from None
        if image.mode not in BYTES:
            image.close()
            raise DataError(f"{name} has pixels of mode {image.mode!r}; convert it to 8 bits a channel")
        return image


def imagefolder(request: Request) -> Data:
    """A folder per class, `DIR/<class>/<image>`: classes alphabetical, rows round-robin over them, files by name."""
    folder = Path(request.source).expanduser()
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise DataError(f"{folder} {state}; imagefolder:DIR reads DIR/<class>/<image>")
    return folder_data(f"imagefolder:{folder.resolve().name}", folder, "all")


def folder_data(name: str, folder: Path, part: str) -> Data:
    """The image folder as data, named `name`."""
    classes = sorted(entry.name for entry in _entries(folder) if entry.is_dir())
    if not classes:
        raise DataError(f"{folder} holds no class folders; expected {folder}/<class>/<image>")
    known = _extensions()
    paths: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        files = sorted(path.name for path in _entries(folder / class_name) if path.suffix.lower() in known)
        if not files:
            raise DataError(f"{folder / class_name} holds no image files; expected {folder}/<class>/<image>")
        paths += [str(folder / class_name / file) for file in files]
        labels += [label] * len(files)
    order = round_robin(labels)
    images = EncodedImages([paths[row] for row in order])
    return Data(name, tuple(classes), images, check_labels(np.array(labels)[order], str(folder)), part)


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, hidden files left out."""
    try:
        return [path for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {one_line(error)}") from None


def _extensions() -> frozenset[str]:
    from PIL import Image

    return frozenset(Image.registered_extensions())


def csv_file(request: Request) -> Data:
    """A CSV table with the columns path and label: paths relative to the table, labels numbers or class names."""
    table = Path(request.source).expanduser()
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = _rows(csv.DictReader(stream), table)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{table} cannot be read as a CSV table: {one_line(error)}") from None
    if not rows:
        raise DataError(f"{table} has no rows; expected the columns path,label and a row for each image")
    missing = next(((line, path) for line, path, _ in rows if not (table.parent / path).is_file()), None)
    if missing:
        raise DataError(f"{table} line {missing[0]}: {table.parent / missing[1]} does not exist")
    classes, labels = _labels([(line, label) for line, _, label in rows], table)
    images = EncodedImages([str(table.parent / path) for _, path, _ in rows])
    return Data(f"csv:{table.name}", classes, images, labels)


def _rows(reader: csv.DictReader[str], table: Path) -> list[tuple[int, str, str]]:
    """Line number, path and label of every row."""
    columns = [name.strip() for name in reader.fieldnames or ()]
    if not {"path", "label"} <= set(columns):
        raise DataError(f"{table} has the columns {', '.join(columns) or '(none)'}; expected path and label")
    reader.fieldnames = columns
    rows = []
    for row in reader:
        path, label = (row[column] or "" for column in ("path", "label"))
        if not path.strip() or not label.strip():
            raise DataError(f"{table} line {reader.line_num}: expected a path and a label")
        rows.append((reader.line_num, path.strip(), label.strip()))
    return rows


def _labels(values: Iterable[tuple[int, str]], table: Path) -> tuple[tuple[str, ...], Tensor]:
    """Class names and labels: numbers if the first label is one, else names in alphabetical order."""
    values = list(values)
    if not _is_number(values[0][1]):
        classes = sorted({label for _, label in values})
        places = {name: place for place, name in enumerate(classes)}
        return tuple(classes), torch.tensor([places[label] for _, label in values])
    for line, label in values:
        if not _is_number(label):
            raise DataError(f"{table} line {line}: label {label!r} is no whole number, as those above it are")
    labels = check_labels(np.array([float(label) for _, label in values]), str(table))
    return tuple(str(label) for label in range(int(labels.max()) + 1)), labels


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()
