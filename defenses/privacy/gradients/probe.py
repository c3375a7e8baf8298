"""Whether every layer sees the batch first: a forward of one sample less tells, where shapes alone would not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

from robust.errors import ModelError


def probe(
    model: nn.Module, layers: Sequence[tuple[str, nn.Module]], args: Any, kwargs: Any, rows: int
) -> None:
    """Runs a model on all but the last of `rows` samples, without gradients, and looks at its layers' inputs.

    A layer that gets (T, B, …) in a batch of B = T samples would have its positions clipped as if they were samples,
    which protects nobody; with one sample less the two differ.

    Raises:
        ModelError: a layer's first dimension does not follow the batch.
    """

    def fewer(value: Any) -> Any:
        return value[: rows - 1] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value

    def look(name: str) -> Any:
        def hook(module: nn.Module, given: Any, named: Any) -> None:
            inputs = [one for one in tree_flatten((given, named))[0] if isinstance(one, Tensor) and one.ndim]
            if inputs and len(inputs[0]) != rows - 1:
                raise ModelError(
                    f"{name} gets an input {tuple(inputs[0].shape)} in a batch of {rows - 1}: its first dimension must "
                    "be the batch, or its parameters have no per-sample gradient"
                )

        return hook

    hooks = [layer.register_forward_pre_hook(look(name), with_kwargs=True) for name, layer in layers]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    try:
        with torch.random.fork_rng(list(devices)), torch.no_grad():
            model(*tree_map(fewer, args), **tree_map(fewer, kwargs))
    finally:
        for hook in hooks:
            hook.remove()
