"""Operators of `torch.library` around fused kernels, so that `torch.compile` and CUDA graphs keep them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]


def operator(name: str, schema: str, body: Operator, fake: Operator) -> Operator:
    """`torch.ops.robust.<name>`.

    Args:
        name: the operator's name.
        schema: its arguments and results in the notation of `torch.library`.
        body: launches a kernel; returns new tensors.
        fake: the results' shapes, dtypes and strides, as `body` makes them.
    """
    made: Any = torch.library.custom_op(f"robust::{name}", body, mutates_args=(), schema=schema)
    made.register_fake(fake)
    packet: Operator = getattr(torch.ops.robust, name)
    return packet


def alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in one dense layout, the first one's where they all have it, so that a row is a run of memory.

    A step treats all coordinates of a row alike, so images in `channels_last` need no copy.

    Raises:
        ValueError: shapes or dtypes differ.
    """
    first = tensors[0]
    for other in tensors[1:]:
        if other.shape != first.shape or other.dtype != first.dtype:
            said = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (first, other))
            raise ValueError(f"a fused step takes tensors of one shape and dtype, not {said}")
    return tensors if _one_layout(tensors) else tuple(tensor.contiguous() for tensor in tensors)


def empty_alike(*tensors: Tensor) -> Tensor:
    """What `alike` makes of the first tensor, empty."""
    if _one_layout(tensors):
        return torch.empty_like(tensors[0])
    return torch.empty_like(tensors[0], memory_format=torch.contiguous_format)


def _one_layout(tensors: tuple[Tensor, ...]) -> bool:
    first = tensors[0]
    dense = first.is_contiguous() or (
        first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
    )
    return dense and all(tensor.stride() == first.stride() for tensor in tensors)
