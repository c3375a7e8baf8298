"""One face for what `evaluate` accepts as data: tensors, or anything indexable by sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

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
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(list(rows), dtype=torch.long)
        return self.x[index.to(self.x.device)].float(), self.y[index.to(self.y.device)].long()


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
            raise DataError(f"the data's items must be pairs (x, y) of a tensor and a class: {error}") from error
        if len({tuple(point.shape) for point in points}) > 1:
            raise DataError("the data's items have different shapes; resize them to one")
        return torch.stack(points).float(), labels


def as_source(x: Any, y: Tensor | None = None) -> Source:
    """Data for `evaluate` and `verify`.

    Args:
        x: (N, C, H, W) with `y` (N,), or indexable pairs (x, y): a Data, a torch Dataset, a list.
    """
    if isinstance(x, Tensor):
        if y is None:
            raise DataError("labels are missing: give y beside x, or data of pairs (x, y)")
        if not x.is_floating_point():
            raise DataError(f"x is {x.dtype}; give floating-point values in the model's box (uint8 images: x / 255)")
        if len(x) == 0:
            raise DataError("the data is empty; give at least one sample")
        if y.shape != (len(x),) or y.is_floating_point():
            raise DataError(f"y is {tuple(y.shape)} of {y.dtype}; it must be integer classes ({len(x)},)")
        if int(y.min()) < 0:
            raise DataError(f"y holds the class {int(y.min())}; classes are 0, 1, …")
        return _Tensors(x, y)
    if not hasattr(x, "__len__") or not hasattr(x, "__getitem__"):
        raise DataError(f"data of type {type(x).__name__} is not indexable; give tensors x, y or pairs (x, y)")
    if len(x) == 0:
        raise DataError("the data is empty; give at least one sample")
    return x if hasattr(x, "batch") else _Indexed(x)
