"""MNIST and Fashion-MNIST: IDX files, gzipped or not, downloaded by torchvision where absent."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robust.data.base import ArrayImages, Data, Request, check_labels
from robust.data.fetch import download, one_line
from robust.errors import DataError

GARMENTS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
UBYTE = 0x08  # the IDX type byte of unsigned bytes


def mnist(request: Request) -> Data:
    """MNIST's handwritten digits (LeCun et al. 1998), (1, 28, 28): 60,000 to train on, 10,000 to test on.

    Read from IDX files in `root`, `root/mnist` or `root/MNIST/raw`, gzipped or not; downloaded where absent.
    """
    root = request.root
    folders = (root / "MNIST" / "raw", root / "mnist", root)
    return _load("mnist", "MNIST", folders, tuple("0123456789"), request)


def fashion_mnist(request: Request) -> Data:
    """Fashion-MNIST's garments (Xiao et al. 2017), (1, 28, 28): 60,000 to train on, 10,000 to test on.

    Read from IDX files in `root/fashion-mnist` or `root/FashionMNIST/raw`, gzipped or not; downloaded where absent.
    (Not from `root` itself: MNIST's files have the same names.)
    """
    folders = (request.root / "FashionMNIST" / "raw", request.root / "fashion-mnist")
    return _load("fashion-mnist", "FashionMNIST", folders, GARMENTS, request)


def _load(
    name: str, torchvision_name: str, folders: tuple[Path, ...], classes: tuple[str, ...], request: Request
) -> Data:
    stem = "train" if request.train else "t10k"
    files = _find(folders, stem)
    if files is None:
        expected = f"{folders[1].name}/{stem}-images-idx3-ubyte.gz and {stem}-labels-idx1-ubyte.gz"
        _fetch(name, torchvision_name, request.root, expected)
        files = _find(folders, stem)
    if files is None:
        raise DataError(f"{name} was downloaded to {request.root}, but its {stem} files are not there")
    images, labels = (read_idx(path) for path in files)
    if images.ndim != 3:
        raise DataError(f"{files[0]} holds an array of shape {images.shape}; expected (N, height, width)")
    return Data(
        name=name,
        classes=classes,
        images=ArrayImages(images[:, None]),
        labels=check_labels(labels, str(files[1]), len(classes)),
        part=request.part,
    )


def _find(folders: tuple[Path, ...], stem: str) -> tuple[Path, Path] | None:
    """The images' and the labels' file of one part, from the first folder that has both."""
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    for folder in folders:
        found = [path for name in names for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        images = [path for path in found if path.name.startswith(names[0])]
        labels = [path for path in found if path.name.startswith(names[1])]
        if images and labels:
            return images[0], labels[0]
    return None


def _fetch(name: str, torchvision_name: str, root: Path, expected: str) -> None:
    from torchvision import datasets

    def fetch(staging: str) -> None:
        getattr(datasets, torchvision_name)(staging, download=True)

    download(name, fetch, f"{torchvision_name}/raw", root, expected)


def read_idx(path: Path) -> NDArray[Any]:
    """The array of unsigned bytes in an IDX file, gzipped or not, whose header and length are checked."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    if len(content) < 4 or content[:3] != bytes((0, 0, UBYTE)):
        raise DataError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, start, 4)]
    if len(content) != start + math.prod(shape):
        raise DataError(f"{path} is damaged: {len(content)} bytes, not the {shape} its header announces")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
