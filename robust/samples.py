"""Labelled samples in memory, as trainings take them, and accuracy on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.errors import DataError

if TYPE_CHECKING:
    from robust.data import Data


def load_samples(data: Data | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(x, y) in memory; x as uint8 where it holds nothing but multiples of 1/255, which is a quarter of the size."""
    x, y = data if isinstance(data, tuple) else data.tensors()
    if len(x) == 0 or len(x) != len(y):
        raise DataError(f"{len(x)} inputs and {len(y)} labels cannot be trained on; give one label per input")
    if y.dim() != 1 or y.is_floating_point() or int(y.min()) < 0:
        raise DataError(
            f"labels are {y.dtype} of shape {tuple(y.shape)}; they must be class numbers (N,) from 0"
        )
    return (x if x.dtype == torch.uint8 else _packed(x)), y.long()


def _packed(x: Tensor) -> Tensor:
    small = torch.empty(x.shape, dtype=torch.uint8)
    for rows, target in zip(x.split(1024), small.split(1024), strict=True):
        target.copy_((rows * 255).round().clamp(0, 255))
        if not torch.equal(target.float() / 255, rows.float().cpu()):
            return x.float()
    return small


def in_box(x: Tensor) -> Tensor:
    """Inputs as floats: bytes stand for multiples of 1/255."""
    return x.float() / 255 if x.dtype == torch.uint8 else x


def accuracy(clf: Classifier, data: Data | tuple[Tensor, Tensor], batch_size: int = 256) -> float:
    """The fraction of `data` that `clf` classifies correctly."""
    x, y = load_samples(data)
    right = 0
    for inputs, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        right += int((clf.logits(in_box(inputs)).argmax(1).cpu() == labels.cpu()).sum())
    return right / len(x)
