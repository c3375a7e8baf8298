"""Augmentation by batches: keyed by the sample, and of the right distribution."""

from __future__ import annotations

import torch

from robust.augment import Augment


def test_an_augmented_sample_does_not_depend_on_its_batch() -> None:
    x = torch.rand(40, 2, 7, 5)
    index = torch.arange(40) + 100
    whole = Augment(crop=2, flip=True)(x, index, 9)
    assert torch.equal(Augment(crop=2, flip=True)(x[13:14], index[13:14], 9), whole[13:14])
    assert not torch.equal(Augment(crop=2, flip=True)(x, index, 10), whole)


def test_crops_are_all_shifts_and_flips_are_half() -> None:
    point = torch.zeros(2000, 1, 5, 5)
    point[:, :, 2, 2] = 1
    moved = Augment(crop=1)(point, torch.arange(2000), 0)
    places = moved.sum((0, 1))
    assert (places[1:4, 1:4] > 150).all()  # 222 expected in each of nine
    assert places.sum() == places[1:4, 1:4].sum() == 2000
    row = torch.tensor([1.0, 2.0, 3.0]).expand(2000, 1, 1, 3)
    mirrored = (Augment(flip=True)(row, torch.arange(2000), 0)[:, 0, 0, 0] == 3).double().mean()
    assert 0.45 < float(mirrored) < 0.55
