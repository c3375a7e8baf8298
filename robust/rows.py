"""One face for what `evaluate` accepts as data: tensors, or anything indexable by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from robust.classifier import require_box
from robust.errors import DataError


class Source(Protocol):
    """Samples that are read a batch at a time."""

    def __len__(self) -> int:
        """Number of samples."""
        ...

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """x (M, C, H, W) float32 and y (M,) of the samples `rows`."""
        ...


class _Tensors:
    def __init__(self, x: Tensor, labels: Tensor) -> None:
        self.x, self.labels = x.detach(), labels

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(list(rows), dtype=torch.long)
        return self.x[index.to(self.x.device)].float(), self.labels[index.to(self.labels.device)].long()


class _Indexed:
    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        pairs = [self.items[i] for i in rows]
        try:
            points = [torch.as_tensor(x) for x, _ in pairs]
            labels = torch.tensor([int(y) for _, y in pairs], dtype=torch.long)
        except (TypeError, ValueError) as error:
            line = f"the data's items must be pairs (x, y) of a tensor and a class: {error}"
            raise DataError(line) from error
        if len({tuple(point.shape) for point in points}) > 1:
            raise DataError("the data's items have different shapes; resize them to one")
        x = torch.stack(points)
        _require_floats(x)
        return x.float(), labels


def as_source(x: Any, y: Tensor | None = None) -> Source:
    """Data for `evaluate` and `verify`.

    Args:
        x: (N, C, H, W) with `y` (N,), or indexable pairs (x, y): a Data, a torch Dataset, a list.
    """
    if isinstance(x, Tensor):
        if y is None:
            raise DataError("labels are missing: give y beside x, or data of pairs (x, y)")
        _require_floats(x)
        if len(x) == 0:
            raise DataError("the data is empty; give at least one sample")
        if y.shape != (len(x),) or y.is_floating_point():
            raise DataError(f"y is {tuple(y.shape)} of {y.dtype}; it must be integer classes ({len(x)},)")
        return _Tensors(x, y)
    if not hasattr(x, "__len__") or not hasattr(x, "__getitem__"):
        kind = type(x).__name__
        raise DataError(f"data of type {kind} is not indexable; give tensors x, y or pairs (x, y)")
    if y is not None:
        raise DataError(f"labels are given twice: data of type {type(x).__name__} has its own; leave y out")
    if len(x) == 0:
        raise DataError("the data is empty; give at least one sample")
    return x if hasattr(x, "batch") else _Indexed(x)


def _require_floats(x: Tensor) -> None:
    if not x.is_floating_point():
        raise DataError(
            f"x is {x.dtype}; give floating-point values in the model's box (uint8 images: x / 255)"
        )


def check_samples(x: Tensor, y: Tensor, bounds: tuple[float, float], classes: int | None = None) -> None:
    """Raises `DataError` for points outside the box, and for labels that are no class of the model.

    Args:
        x: (M, C, H, W); y: (M,) int64.
        classes: how many the model has, where that is known.
    """
    require_box(x, bounds)
    low, high = int(y.min()), int(y.max())
    if low < 0:
        raise DataError(f"y holds the class {low}; classes are 0, 1, …")
    if classes is not None and high >= classes:
        raise DataError(f"y holds the class {high}, the model has {classes}")


def check_whole(source: Source, bounds: tuple[float, float], classes: int | None) -> None:
    """`check_samples` on all that is in memory already, before a run begins; the rest is checked as it is read."""
    labels = getattr(source, "labels", None)
    x = source.x if isinstance(source, _Tensors) else torch.zeros(0)
    if isinstance(labels, Tensor):
        check_samples(x, labels, bounds, classes)
