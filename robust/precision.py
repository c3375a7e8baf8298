"""Exact float32: TF32 and bfloat16 shortcuts switched off while a verdict is computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def _old(read: Callable[[], T], default: T) -> T:
    try:
        return read()
    except RuntimeError:  # the user set the new one only, so that the old one is at its default
        return default


@contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions and products in IEEE float32 while open; the user's settings are restored at the end.

    PyTorch keeps each setting twice (`allow_tf32` and `fp32_precision`) and raises where the two disagree; so both are
    set, and both are restored.
    """
    backends: Any = torch.backends
    nodes = [
        *(backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul),
        *(backends.mkldnn.conv, backends.mkldnn.rnn, backends.mkldnn.matmul),
    ]
    precisions = [node.fp32_precision for node in nodes]
    products = _old(torch.get_float32_matmul_precision, "highest")
    convolutions = _old(lambda: backends.cudnn.allow_tf32, True)
    try:
        torch.set_float32_matmul_precision("highest")
        backends.cudnn.allow_tf32 = False
        for node in nodes:
            node.fp32_precision = "ieee"
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        backends.cudnn.allow_tf32 = convolutions
        for node, precision in zip(nodes, precisions, strict=True):
            node.fp32_precision = precision
