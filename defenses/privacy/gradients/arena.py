"""Memory that per-sample gradients are written to, kept from one backward pass to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


class Arena:
    """Buffers that are lent until `reset`.

    Fresh pages, which the system has to clear, would cost about as much as the gradients.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._lent: list[Tensor] = []

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor in the dtype and on the device of `like`."""
        count = math.prod(shape)
        fitting = [
            buffer
            for buffer in self._free
            if buffer.dtype == like.dtype
            and buffer.device == like.device
            and count <= buffer.numel() <= 2 * count
        ]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not buffer]
        else:
            buffer = like.new_empty(count)
        self._lent.append(buffer)
        return buffer[:count].view(*shape)

    def reset(self) -> None:
        """Ends all loans; buffers that the last ones had no use for are given up."""
        self._free, self._lent = self._lent, []
