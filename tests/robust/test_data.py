"""Claims about `load_data`: specs, the embedded digits, and data as a sequence."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robust.data import REGISTRY, Data, load_data
from robust.data.base import round_robin
from robust.errors import UnknownName
from tests.robust.pictures import fails, folder

# Digits


def test_digits_are_split_as_documented() -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ranks = [hashlib.sha256(f"digits:{row}".encode()).hexdigest() for row in range(1797)]
    per_class = [sorted(np.flatnonzero(bunch.target == label), key=ranks.__getitem__) for label in range(10)]
    rows = [group[place] for place in range(50) for group in per_class]
    test, train = load_data("digits"), load_data("digits", train=True)
    assert (len(test), len(train), test.shape, train.part) == (500, 1297, (1, 8, 8), "train")
    assert test.labels.tolist() == bunch.target[rows].tolist()
    assert torch.equal(test.tensors()[0][:, 0] * 16, torch.from_numpy(bunch.images[rows]).float())
    assert torch.equal(train[0][0][0] * 16, torch.from_numpy(bunch.images[per_class[0][50]]).float())


def test_digits_parts_are_disjoint_complete_and_scaled() -> None:
    from sklearn.datasets import load_digits

    x = torch.cat([load_data("digits", train=part).tensors()[0] for part in (False, True)])
    assert x.dtype == torch.float32
    assert (float(x.min()), float(x.max())) == (0, 1)
    own = sorted(map(bytes, (x * 16).to(torch.uint8).flatten(1).numpy()))
    assert own == sorted(map(bytes, load_digits().images.astype(np.uint8).reshape(-1, 64)))


def test_any_prefix_of_the_digits_is_balanced() -> None:
    for n in (10, 100, 500):
        _, y = load_data("digits", n=n).tensors()
        assert y.bincount(minlength=10).tolist() == [n // 10] * 10


# Data as a sequence


def test_data_indexes_slices_iterates_and_batches_alike() -> None:
    data = load_data("digits", n=30)
    x, y = data.tensors()
    assert (x.dtype, y.dtype, tuple(x.shape)) == (torch.float32, torch.int64, (30, 1, 8, 8))
    assert torch.equal(torch.stack([image for image, _ in data]), x)
    assert [label for _, label in data] == y.tolist()
    some, labels = data.batch([3, -1, 3])
    assert torch.equal(some, x[[3, 29, 3]])
    assert torch.equal(labels, y[[3, 29, 3]])
    assert torch.equal(data.batch(slice(20, None))[0], x[20:])
    assert torch.equal(data.batch(torch.tensor([1, 2]))[0], x[1:3])
    assert tuple(data.batch([])[0].shape) == (0, 1, 8, 8)
    part = data.subset(range(29, 19, -1))
    assert torch.equal(part.tensors()[0], x.flip(0)[:10])
    assert part.subset([0])[0][1] == y[29]


def test_a_row_that_does_not_exist_is_an_index_error() -> None:
    data = load_data("digits", n=3)
    for row in (3, -4):
        with pytest.raises(IndexError, match=f"row {row} of digits, which has 3"):
            data[row]


def test_fewer_samples_than_n_are_all_of_them() -> None:
    assert len(load_data("digits", n=100_000)) == 500


@given(st.lists(st.integers(0, 4), max_size=40))
def test_round_robin_deals_the_classes_out_evenly(labels: list[int]) -> None:
    order = round_robin(labels)
    assert sorted(order) == list(range(len(labels)))
    for n in range(len(order) + 1):
        seen = [labels[row] for row in order[:n]]
        for label in set(labels):
            left = labels.count(label) > seen.count(label)
            assert not left or seen.count(label) >= max(map(seen.count, set(seen)), default=0) - 1
    for label in set(labels):
        rows = [row for row in order if labels[row] == label]
        assert rows == sorted(rows)


@pytest.mark.parametrize("n", [0, -3, True, 2.5])
def test_n_must_be_a_number_of_samples(n: object) -> None:
    fails(f"n = {n!r} is not a number of samples", "digits", n=n)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("digts", "unknown data 'digts'; did you mean digits"),
        ("minst", "did you mean mnist"),
        ("zzz", "known are cifar10, cifar100, csv"),
        ("", "known are"),
        ("digits:x", "takes no path"),
        ("imagefolder", "lacks its path; write imagefolder:DIR"),
        ("npz:", "write npz:FILE"),
        ("/data/some.npz", "did you mean npz:/data/some.npz"),
        ("some.csv", "did you mean csv:some.csv"),
    ],
)
def test_a_bad_spec_gets_one_line(spec: str, line: str) -> None:
    fails(line, spec)


def test_a_bare_folder_is_told_to_be_an_image_folder(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=f"did you mean imagefolder:{tmp_path}"):
        load_data(str(tmp_path))


def test_importing_the_data_loads_no_library_that_only_one_kind_needs() -> None:
    heavy = "[m for m in ('torchvision', 'sklearn', 'PIL', 'scipy') if m in sys.modules]"
    code = f"import sys, robust.data, robust.models, robust.zoo; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_kind_of_data_has_a_card(name: str) -> None:
    assert (REGISTRY.load(name).__doc__ or "").strip()


def test_data_survives_a_pickle_so_that_workers_can_read_it(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 2, "b": 2})
    data = load_data(f"imagefolder:{tmp_path}")
    copy: Data = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.tensors()[0], data.tensors()[0])
