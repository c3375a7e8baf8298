"""What detectors see of a model's inside: the inputs of its weighted layers, pooled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.errors import ModelError

WIDEST = 512  # features of a layer; wider ones are averaged down to so many
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def _tapped(modules: Sequence[nn.Module], seen: dict[int, Tensor]) -> Iterator[None]:
    """While open, the first input of each module in a forward is kept, by the module's id, in the order of calls."""

    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.setdefault(id(module), inputs[0])

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def layers(clf: Classifier, x: Tensor, count: int) -> list[nn.Module]:
    """`count` weighted layers, or all if there are fewer, whose inputs are looked at: evenly spread, the last included.

    Their inputs are what the layers before them gave, after the activation; the first layer's is the image, and is only
    taken where there is no other.

    Raises:
        ModelError: the model has no linear or convolutional layer.
    """
    modules = {id(part): part for part in clf.module.modules() if isinstance(part, _WEIGHTED)}
    seen: dict[int, Tensor] = {}
    with _tapped(list(modules.values()), seen), clf.session():
        clf.logits(x[:2])
    called = [modules[key] for key in seen]
    if not called:
        raise ModelError(
            f"{clf.name} has no linear or convolutional layer to look into; choose another detector"
        )
    inner = called[1:] or called
    count = min(count, len(inner))
    return [inner[-1 - (k * len(inner)) // count] for k in reversed(range(count))]


def features(clf: Classifier, x: Tensor, modules: Sequence[nn.Module]) -> tuple[Tensor, list[Tensor]]:
    """Logits (N, K) of x, and of every layer its features (N, d): means over places, at most `WIDEST` of them."""
    seen: dict[int, Tensor] = {}
    with _tapped(modules, seen):
        logits = clf(x)
    return logits, [_pooled(seen[id(module)]) for module in modules]


def features_of_all(
    clf: Classifier, x: Tensor, modules: Sequence[nn.Module], batch: int = 128
) -> list[Tensor]:
    """`features` of many points, a batch at a time and without a graph."""
    with torch.no_grad():
        parts = [features(clf, part, modules)[1] for part in x.split(batch)]
    return [torch.cat(layer) for layer in zip(*parts, strict=True)]


def _pooled(values: Tensor) -> Tensor:
    flat = values.flatten(2).mean(2) if values.dim() > 2 else values
    flat = flat.float()
    return flat if flat.shape[1] <= WIDEST else F.adaptive_avg_pool1d(flat[:, None], WIDEST)[:, 0]
