"""Claims about MNIST and CIFAR: found wherever people keep them, the same from everywhere."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import shutil
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from robust.data import load_data
from robust.data.cifar import CLASSES
from tests.robust.pictures import Trap, fails, idx, picture, save


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every connection fails at once, as on a machine without a network."""

    def refuse(*arguments: object, **options: object) -> None:
        raise socket.gaierror("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


# MNIST


@pytest.mark.parametrize("place", ["", "mnist", "MNIST/raw"])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_found_wherever_people_keep_it(tmp_path: Path, place: str, packed: bool) -> None:
    images, labels = picture(1, (5, 28, 28)), np.array([3, 1, 4, 1, 5], np.uint8)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    for name, array in (("t10k-images-idx3-ubyte", images), ("t10k-labels-idx1-ubyte", labels)):
        content = idx(array)
        path = tmp_path / place / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(content) if packed else content)
    data = load_data("mnist", root=tmp_path, n=4)
    assert (data.shape, data.labels.tolist(), len(data.classes)) == ((1, 28, 28), [3, 1, 4, 1], 10)
    assert torch.equal(data.tensors()[0][:, 0], torch.from_numpy(images[:4]).float() / 255)


def test_the_environment_names_the_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, array in (
        ("images-idx3", picture(1, (2, 28, 28))),
        ("labels-idx1", np.array([0, 1], np.uint8)),
    ):
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(idx(array))
    monkeypatch.setenv("ROBUST_DATA", str(tmp_path))
    assert len(load_data("mnist")) == 2


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x08", "not an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00", "not an IDX file of unsigned bytes"),
        (idx(picture(1, (2, 28, 28)))[:-1], "is damaged"),
        (b"\x00\x00\x08\x03\x00\x00", "is damaged"),
        (idx(np.zeros(4, np.uint8)), "expected .N, height, width"),
    ],
)
def test_a_damaged_idx_file_gets_one_line(tmp_path: Path, content: bytes, line: str) -> None:
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(content)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    fails(line, "mnist", root=tmp_path)


def test_a_damaged_gzip_file_gets_one_line(tmp_path: Path) -> None:
    packed = gzip.compress(idx(picture(1, (4, 28, 28))))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(4, np.uint8)))
    for damaged in (packed[:-20], b"no gzip", packed[:50] + b"\xff" * 50 + packed[100:]):
        (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(damaged)
        fails("cannot be read", "mnist", root=tmp_path)


def test_fashion_mnist_is_not_mistaken_for_mnist(tmp_path: Path, no_network: None) -> None:
    for name, array in (
        ("images-idx3", picture(1, (2, 28, 28))),
        ("labels-idx1", np.array([0, 1], np.uint8)),
    ):
        (tmp_path / f"t10k-{name}-ubyte").write_bytes(idx(array))
    fails("fashion-mnist is not in", "fashion-mnist", root=tmp_path)
    (tmp_path / "fashion-mnist").mkdir()
    for path in tmp_path.glob("t10k*"):
        path.rename(tmp_path / "fashion-mnist" / path.name)
    assert load_data("fashion-mnist", root=tmp_path).classes[1] == "Trouser"


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100"])
def test_absent_data_says_where_it_is_expected_and_leaves_nothing(
    tmp_path: Path, name: str, no_network: None
) -> None:
    fails(
        f"^{name} is not in .*could not be downloaded .*expected there: .*ROBUST_DATA",
        name,
        root=tmp_path / "a/b",
    )
    assert not list(tmp_path.iterdir())


def test_a_download_that_succeeds_is_moved_into_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    def fetch(self: object, root: str, download: bool) -> None:
        raw = Path(root, "MNIST", "raw")
        raw.mkdir(parents=True)
        (raw / "t10k-images-idx3-ubyte").write_bytes(idx(picture(1, (2, 28, 28))))
        (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([0, 1], np.uint8)))

    monkeypatch.setattr(datasets.MNIST, "__init__", fetch)
    monkeypatch.setattr(datasets.MNIST, "__del__", lambda self: None, raising=False)
    assert len(load_data("mnist", root=tmp_path / "new")) == 2
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["MNIST"]


# CIFAR


def cifar_folder(root: Path, part: str = "test") -> Path:
    """Two images of each of CIFAR-10's classes, whose files sort in another order than they were made."""
    for label, name in enumerate(CLASSES):
        for number in range(2):
            save(
                root / "cifar10" / part / name / f"{name}_s_{1 - number}.png",
                10 * label + number,
                (32, 32, 3),
            )
    return root


def cifar_batches(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same images as torchvision keeps them, shuffled, under digests that it accepts."""
    from torchvision import datasets

    rows = np.random.default_rng(0).permutation(20)
    batch = {
        "data": np.stack(
            [picture(10 * (r // 2) + r % 2, (32, 32, 3)).transpose(2, 0, 1).reshape(-1) for r in rows]
        ),
        "labels": [int(r // 2) for r in rows],
        "filenames": [f"{CLASSES[r // 2]}_s_{1 - r % 2}.png" for r in rows],
    }
    base = root / "cifar-10-batches-py"
    base.mkdir(parents=True)
    (base / "test_batch").write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(CLASSES)}))
    digests = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in base.iterdir()}
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", digests["test_batch"]]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": digests["batches.meta"]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return root


def packed(root: Path, part: str = "test") -> Path:
    """The image folder as an archive, its members in an odd order."""
    (root / "packed").mkdir()
    with tarfile.open(root / "packed" / f"cifar10-{part}.tar.gz", "w:gz") as tar:
        for path in sorted((root / "cifar10").rglob("*"), reverse=True):
            tar.add(path, path.relative_to(root), recursive=False)
    return root / "packed"


def test_cifar10_is_the_same_from_folder_archive_and_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpacked = cifar_folder(tmp_path)
    sources = [unpacked, unpacked / "cifar10", packed(tmp_path), cifar_batches(tmp_path / "tv", monkeypatch)]
    x, y = load_data("cifar10", root=sources[0]).tensors()
    assert y.tolist() == [*range(10), *range(10)]
    assert torch.equal(x[0], torch.from_numpy(picture(1, (32, 32, 3))).permute(2, 0, 1).float() / 255)
    for source in sources[1:]:
        data = load_data("cifar10", root=source)
        assert (data.classes, data.name, data.part) == (CLASSES, "cifar10", "test")
        assert torch.equal(data.tensors()[0], x)
        assert torch.equal(data.tensors()[1], y)
        assert torch.equal(load_data("cifar10", root=source, n=13).tensors()[0], x[:13])


def test_cifar10_parts_are_kept_apart(tmp_path: Path) -> None:
    cifar_folder(tmp_path, "train")
    assert load_data("cifar10", root=packed(tmp_path, "train"), train=True).part == "train"


def test_a_cifar10_folder_without_one_class_is_refused(tmp_path: Path) -> None:
    cifar_folder(tmp_path)
    shutil.rmtree(tmp_path / "cifar10" / "test" / "dog")
    fails("has the classes airplane, .*; expected airplane", "cifar10", root=tmp_path)
    fails("has the classes", "cifar10", root=packed(tmp_path))


def test_a_damaged_or_foreign_archive_gets_one_line(tmp_path: Path) -> None:
    content = (packed(cifar_folder(tmp_path)) / "cifar10-test.tar.gz").read_bytes()
    path = tmp_path / "bad" / "cifar10-test.tar.gz"
    path.parent.mkdir()
    for damaged in (content[: len(content) // 2], b"", b"nothing of the kind", content[:99] + content[120:]):
        path.write_bytes(damaged)
        fails(
            r"cifar10-test\.tar\.gz (cannot be read|holds no files|has the classes)",
            "cifar10",
            root=path.parent,
        )
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("else/readme"), io.BytesIO())
    fails("holds no files cifar10/test/<class>/<image>", "cifar10", root=path.parent)


def test_altered_torchvision_batches_are_never_unpickled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = cifar_batches(tmp_path, monkeypatch)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    fails("is damaged .*remove it", "cifar10", root=root)
    assert not (tmp_path / "ran").exists()


def test_cifar100_comes_from_torchvision_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    base = tmp_path / "cifar-100-python"
    base.mkdir()
    data = np.stack([picture(value, (3072,)) for value in range(3)])
    (base / "test").write_bytes(
        pickle.dumps({"data": data, "fine_labels": [7, 0, 99], "filenames": ["c", "b", "a"]})
    )
    (base / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"c{label}" for label in range(100)]}))
    digests = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in base.iterdir()}
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", digests["test"]]])
    meta = {"filename": "meta", "key": "fine_label_names", "md5": digests["meta"]}
    monkeypatch.setattr(datasets.CIFAR100, "meta", meta)
    found = load_data("cifar100", root=tmp_path)
    assert (found.labels.tolist(), len(found.classes), found.shape) == ([7, 0, 99], 100, (3, 32, 32))
    assert torch.equal(found[1][0], torch.from_numpy(data[1]).reshape(3, 32, 32).float() / 255)


# Real data


def test_mnist_test_part(shared: Path) -> None:
    data = load_data("mnist", root=shared / "data")
    assert (len(data), data.shape, data.part) == (10_000, (1, 28, 28), "test")
    assert data.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert abs(float(data.tensors()[0].mean()) - 0.1325) < 1e-3


def test_mnist_agrees_with_torchvision(mnist_root: Path, tmp_path: Path) -> None:
    from torchvision import datasets

    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in (mnist_root / "MNIST" / "raw").glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    theirs = datasets.MNIST(str(tmp_path), train=True)
    ours = load_data("mnist", root=mnist_root, train=True)
    assert len(ours) == 60_000
    assert torch.equal(ours.batch(range(1000))[0], theirs.data[:1000, None].float() / 255)
    assert torch.equal(ours.labels, theirs.targets)


def test_cifar10_images_agree_between_folder_and_archive(shared: Path, cifar10_test: Path) -> None:
    files = load_data(f"imagefolder:{cifar10_test}", n=1000)
    packed = load_data("cifar10", root=shared / "data", n=1000)
    assert (len(files), packed.shape, files.classes) == (1000, (3, 32, 32), CLASSES)
    assert torch.equal(files.labels, packed.labels)
    rows = [0, 1, 9, 10, 500, 999]
    assert torch.equal(files.batch(rows)[0], packed.batch(rows)[0])
    assert files.labels.bincount().tolist() == [100] * 10
