"""Labelled images by name: `load_data("digits")`, `"mnist"`, `"imagefolder:DIR"`, `"npz:FILE"`, `"csv:FILE"`, ..."""

from __future__ import annotations

import os
from pathlib import Path

from robust.data.base import Data, Request
from robust.errors import DataError, UnknownName
from robust.registry import Registry, unknown

REGISTRY = Registry(
    "data",
    {
        "digits": "robust.data.digits:digits",
        "mnist": "robust.data.mnist:mnist",
        "fashion-mnist": "robust.data.mnist:fashion_mnist",
        "cifar10": "robust.data.cifar:cifar10",
        "cifar100": "robust.data.cifar:cifar100",
        "imagefolder": "robust.data.files:imagefolder",
        "csv": "robust.data.files:csv_file",
        "npz": "robust.data.arrays:npz",
    },
)
get = REGISTRY.load

FROM_PATH = {"imagefolder": "DIR", "csv": "FILE", "npz": "FILE"}  # what stands behind the colon
CACHE = "~/.cache/robust-toolkit"

__all__ = ["REGISTRY", "Data", "data_root", "get", "load_data"]


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of the named data sets: `root`, else the environment's ROBUST_DATA, else ~/.cache/robust-toolkit."""
    return Path(root or os.environ.get("ROBUST_DATA") or CACHE).expanduser()


def load_data(
    spec: str, *, n: int | None = None, root: str | os.PathLike[str] | None = None, train: bool = False
) -> Data:
    """Labelled images in [0, 1] by their spec.

    Args:
        spec: `digits`, `mnist`, `fashion-mnist`, `cifar10`, `cifar100`, `imagefolder:DIR` (one folder per class,
            classes in alphabetical order), `npz:FILE` (arrays x and y) or `csv:FILE` (columns path and label).
        n: at most this many samples, from the front. The order is round-robin over the classes for `digits`,
            `cifar10` and `imagefolder:` (so that any prefix is balanced), else the data's own. A data set with
            fewer samples gives all it has.
        root: the folder of the named data sets, see `data_root`; what is absent there is downloaded to it.
        train: the training part instead of the test part. A folder or file of the user's has one part only, which
            is given for both.

    Raises:
        UnknownName: for an unknown kind of data, with the nearest known ones.
        DataError: for data that is absent, empty, unreadable, or of a wrong shape or range.
    """
    kind, source = _parse(spec)
    if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
        raise DataError(f"n = {n!r} is not a number of samples; give a whole number of at least 1")
    data: Data = get(kind)(Request(source, data_root(root), train))
    if n is not None and n < len(data):
        data = data.subset(range(n))
    data.images.probe()
    return data


def _parse(spec: str) -> tuple[str, str]:
    """The kind and the path of a spec ("npz:a.npz" -> "npz", "a.npz"), or the one line that says what is wrong."""
    kind, colon, source = str(spec).partition(":")
    if kind not in REGISTRY:
        raise UnknownName(_guess(str(spec)) or unknown("data", kind, REGISTRY))
    if kind in FROM_PATH and not source:
        raise DataError(f"data {spec!r} lacks its path; write {kind}:{FROM_PATH[kind]}")
    if kind not in FROM_PATH and colon:
        raise DataError(f"data {kind!r} takes no path; write {kind!r}, and give its folder as the data root")
    return kind, source


def _guess(spec: str) -> str | None:
    """A line for a spec that is a bare path: the kind that reads it."""
    path = Path(spec).expanduser()
    kinds = {".npz": "npz", ".csv": "csv"}
    kind = "imagefolder" if spec and path.is_dir() else kinds.get(path.suffix.lower())
    return kind and f"unknown data {spec!r}; did you mean {kind}:{spec}?"
