"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009): image folders, archives of them, or torchvision's files."""

from __future__ import annotations

import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from robust.data.base import ArrayImages, Data, Request, check_labels, round_robin
from robust.data.fetch import download, one_line
from robust.data.files import EncodedImages, folder_data
from robust.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def cifar10(request: Request) -> Data:
    """CIFAR-10 (Krizhevsky 2009), (3, 32, 32): 50,000 to train on, 10,000 to test on.

    Read from `root/cifar10/{test,train}/<class>/` (or `root` being that `cifar10`), from
    `root/cifar10-{test,train}.tar.gz`, which holds the same, or from torchvision's `root/cifar-10-batches-py`;
    downloaded where absent. The order is the same from each: round-robin over the classes, files sorted by name.
    """
    root, part = request.root, request.part
    for folder in (root / "cifar10" / part, root / part):
        if (folder / CLASSES[0]).is_dir():
            return _ten(folder_data("cifar10", folder, part), str(folder))
    archive = root / f"cifar10-{part}.tar.gz"
    if archive.is_file():
        return _ten(_archive_data(archive, part), str(archive))
    dataset = _torchvision("cifar10", "CIFAR10", request, f"cifar10/{part}/<class>/ or {archive.name}")
    return _data("cifar10", dataset, _folder_order(dataset), part)


def cifar100(request: Request) -> Data:
    """CIFAR-100 (Krizhevsky 2009), (3, 32, 32), its 100 fine classes: 50,000 to train on, 10,000 to test on.

    Read from torchvision's `root/cifar-100-python`, in its order; downloaded where absent.
    """
    dataset = _torchvision("cifar100", "CIFAR100", request, "cifar-100-python/")
    return _data("cifar100", dataset, list(range(len(dataset.targets))), request.part)


def _ten(data: Data, where: str) -> Data:
    """The data, if its classes are CIFAR-10's: a folder too few would shift every label behind it."""
    if data.classes != CLASSES:
        raise DataError(f"{where} has the classes {', '.join(data.classes)}; expected {', '.join(CLASSES)}")
    return data


def _archive_data(path: Path, part: str) -> Data:
    """An archived image folder, kept in memory as it is (88 MB for the training part), decoded when read."""
    files: dict[tuple[str, str], bytes] = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                stream = archive.extractfile(member) if member.isfile() else None
                parts = Path(member.name).parts
                if stream and len(parts) >= 3 and parts[-3] == part and not parts[-1].startswith("."):
                    files[parts[-2], parts[-1]] = stream.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {one_line(error)}") from None
    if not files:
        raise DataError(f"{path} holds no files cifar10/{part}/<class>/<image>")
    classes = sorted({name for name, _ in files})
    keys = sorted(files)
    labels = [classes.index(name) for name, _ in keys]
    order = round_robin(labels)
    images = EncodedImages(
        [f"{path}:{'/'.join(keys[row])}" for row in order], [files[keys[row]] for row in order]
    )
    return Data("cifar10", tuple(classes), images, check_labels(np.array(labels)[order], str(path)), part)


def _torchvision(name: str, torchvision_name: str, request: Request, expected: str) -> Any:
    """torchvision's data set from `root`, downloaded where absent; it compares every file with its known digest."""
    from torchvision import datasets

    kind = getattr(datasets, torchvision_name)
    folder = request.root / kind.base_folder
    if not folder.is_dir():

        def fetch(staging: str) -> None:
            kind(staging, download=True)

        download(name, fetch, kind.base_folder, request.root, f"{expected}, or {kind.base_folder}/")
    try:
        return kind(str(request.root), train=request.train)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{folder} is damaged ({one_line(error)}); remove it to download it again") from None


def _folder_order(dataset: Any) -> list[int]:
    """Rows of torchvision's CIFAR-10 in the order of the image folders: its batches know the images' file names."""
    names: list[str] = []
    for file, _ in dataset.train_list if dataset.train else dataset.test_list:
        # torchvision has just compared this file's digest with the published one
        with Path(dataset.root, dataset.base_folder, file).open("rb") as stream:
            names += pickle.load(stream, encoding="latin1")["filenames"]
    by_name = sorted(range(len(names)), key=lambda row: (dataset.targets[row], names[row]))
    order = round_robin([dataset.targets[row] for row in by_name])
    return [by_name[place] for place in order]


def _data(name: str, dataset: Any, rows: list[int], part: str) -> Data:
    images = ArrayImages(dataset.data[rows].transpose(0, 3, 1, 2))
    labels = check_labels(np.array(dataset.targets)[rows], name, len(dataset.classes))
    return Data(name, tuple(dataset.classes), images, labels, part)
