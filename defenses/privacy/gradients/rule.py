"""What the engine needs to know of a kind of layer: its forward, and a backward that keeps the samples apart."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robust.defenses.privacy.gradients.arena import Arena
from robust.defenses.privacy.gradients.parts import Part

Parts = dict[str, Part]


class Rule(ABC):
    """One kind of layer with one input.

    Attributes:
        kinds: the layers; a subclass of one counts where it inherits the forward.
        batched: smallest number of dimensions of an input that has a batch.
    """

    kinds: ClassVar[tuple[type[nn.Module], ...]] = ()

    def refuses(self, module: Any) -> str | None:
        """Why this layer's options leave no per-sample gradient, and what would; None if nothing is wrong."""
        return None

    def prepare(self, module: Any, x: Tensor) -> Tensor:
        """The input as `forward` takes it, by operations that autograd knows."""
        return x

    @abstractmethod
    def forward(self, module: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The layer's output, and what `backward` needs to remember."""

    @abstractmethod
    def backward(
        self, module: Any, saved: tuple[Tensor, ...], grad: Tensor, wants_x: bool, arena: Arena
    ) -> tuple[Tensor | None, Parts]:
        """The gradient of the input if it is wanted, and each parameter's per-sample gradients by name.

        What they are written to may come from `arena`, which holds it until the backward pass has ended.
        """


def value(parameter: Tensor | None, like: Tensor) -> Tensor | None:
    """A parameter's values, in the dtype of the input that autocast may have chosen."""
    return None if parameter is None else parameter.detach().to(like.dtype)


def autocast(x: Tensor) -> Tensor:
    """The input in the dtype that autocast, if it is on, gives to products and convolutions."""
    kind = x.device.type
    if x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x
