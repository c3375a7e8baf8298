"""Losses whose weight gradients are taken elsewhere, and forwards that teach batch normalisation nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Attached(torch.autograd.Function):
    """A number with given gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [upstream[0] * gradient for gradient in ctx.saved_tensors]
        return None, None, *scaled, *[None] * len(scaled)


def attached(value: Tensor, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> Tensor:
    """`value`, a scalar, as a function of `parameters` whose gradient is `gradients` (None: not a function of it).

    So a recipe that has had to take a gradient itself hands it to the loop as a loss like any other, which may be
    scaled, added up and descended on.
    """
    pairs = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
    known = [g for _, g in pairs]
    result: Tensor = _Attached.apply(value.detach(), len(pairs), *[p for p, _ in pairs], *known)
    return result


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that a training moves."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


@contextmanager
def unlearned(module: nn.Module) -> Iterator[None]:
    """Forwards inside see the buffers (running statistics) and may write them; afterwards they are as before.

    Copies take the buffers' places meanwhile: writing the old values back would spoil graphs that hold the buffers.
    """
    held = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    try:
        for owner, name, buffer in held:
            setattr(owner, name, buffer.clone())
        yield
    finally:
        for owner, name, buffer in held:
            setattr(owner, name, buffer)
