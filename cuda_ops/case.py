"""One operation as tests and benchmarks see it: how to make its inputs, and how many bytes it has to move."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Case:
    """An operation of `robust.cuda_ops` with inputs for it.

    Attributes:
        operation: the public function, which dispatches; called as ``operation(**arguments)``.
        reference: its meaning in plain PyTorch; called alike.
        make: (rows, elements, seed, device) -> arguments: rows × elements numbers, odd sizes welcome.
        moved: bytes that a perfect kernel reads and writes once for these arguments.
        backends: the fused implementations it has.
        tolerance: largest error, relative to the largest number of the reference in float64; 0 for bitwise.
    """

    operation: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[int, int, int, torch.device], Arguments]
    moved: Callable[[Arguments], int]
    backends: tuple[str, ...] = ("triton",)
    tolerance: float = 1e-6
