"""Scikit-learn's handwritten digits: the embedded data that needs no download."""

from __future__ import annotations

import hashlib

import numpy as np

from robust.data.base import ArrayImages, Data, Request, check_labels, round_robin

TEST_PER_CLASS = 50


def digits(request: Request) -> Data:
    """Scikit-learn's 1,797 handwritten digits, (1, 8, 8): 1,297 to train on, 500 to test on; no download.

    The split is fixed: each class is shuffled by the SHA-256 of "digits:<row>" (row of `sklearn.datasets.load_digits`),
    its first 50 are the test part. Both parts run round-robin over the classes, so that any prefix is balanced.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = np.asarray(bunch.target)
    shuffled = sorted(range(len(labels)), key=lambda row: hashlib.sha256(f"digits:{row}".encode()).digest())
    rows = [shuffled[place] for place in round_robin([int(labels[row]) for row in shuffled])]
    tested = TEST_PER_CLASS * 10  # the round-robin's first 500 are the first 50 of every class
    rows = rows[tested:] if request.train else rows[:tested]
    images = np.asarray(bunch.images, dtype=np.float32)[rows, None] / np.float32(16)
    return Data(
        name="digits",
        classes=tuple("0123456789"),
        images=ArrayImages(images),
        labels=check_labels(labels[rows], "digits", 10),
        part=request.part,
    )
