"""Per-sample gradients of linear layers and embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.defenses.privacy.gradients.arena import Arena
from robust.defenses.privacy.gradients.parts import Lookup, Outer, Rows
from robust.defenses.privacy.gradients.rule import Parts, Rule, autocast, value

_MOST = 1 << 28  # numbers that are written out without a thought: a gibibyte of float32


class Linear(Rule):
    """Linear layers on (B, p) and (B, …, p): norms from Gram matrices where positions are few, else written out."""

    kinds = (nn.Linear,)

    def prepare(self, module: nn.Linear, x: Tensor) -> Tensor:
        """See `Rule`."""
        return autocast(x)

    def forward(self, module: nn.Linear, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Rule`."""
        weight = value(module.weight, x)
        assert weight is not None
        return F.linear(x, weight, value(module.bias, x)), (x,)

    def backward(
        self, module: nn.Linear, saved: tuple[Tensor, ...], grad: Tensor, wants_x: bool, arena: Arena
    ) -> tuple[Tensor | None, Parts]:
        """See `Rule`."""
        (x,) = saved
        weight = value(module.weight, grad)
        assert weight is not None
        rows, d, p = len(x), module.out_features, module.in_features
        a, g = x.reshape(rows, x[0:1].numel() // p, p), grad.reshape(rows, grad[0:1].numel() // d, d)
        outer = Outer if few(rows, a.shape[1], p, d) else _written
        parts: Parts = {"weight": outer(a, g, module.weight.shape)}
        if module.bias is not None:
            parts["bias"] = Rows(g.sum(1))
        return (grad @ weight if wants_x else None), parts


def few(rows: int, positions: int, p: int, d: int) -> bool:
    """Whether Gram matrices over T positions are cheaper than writing out p·d numbers for every sample.

    They cost T² (p + d) products more, and spare the traffic of p·d numbers that are written once and read twice, which
    weighs as much as some 15 products each; or they are the only form that fits into memory.
    """
    spared = 2 * positions**2 < p * d and rows * p * d > _MOST
    return positions == 1 or positions**2 * (p + d) < 15 * p * d or spared


def _written(a: Tensor, g: Tensor, shape: torch.Size) -> Rows:
    return Rows(torch.bmm(g.mT, a).view(len(a), *shape))


class Embedding(Rule):
    """Embeddings of indices (B, …): a sample touches few rows of the table, which is never written out."""

    kinds = (nn.Embedding,)

    def refuses(self, module: nn.Embedding) -> str | None:
        """See `Rule`."""
        if module.max_norm is not None:
            return "max_norm changes the table outside of the optimizer; leave it out"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq mixes the samples of a batch; leave it out"
        return None

    def forward(self, module: nn.Embedding, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Rule`."""
        return F.embedding(x, module.weight.detach(), module.padding_idx), (x,)

    def backward(
        self, module: nn.Embedding, saved: tuple[Tensor, ...], grad: Tensor, wants_x: bool, arena: Arena
    ) -> tuple[Tensor | None, Parts]:
        """See `Rule`."""
        (index,) = saved
        if module.padding_idx is not None:
            index = index.masked_fill(index == module.padding_idx, -1)
        rows, d = len(index), module.embedding_dim
        flat = index.reshape(rows, index[0:1].numel()).long()
        part = Lookup(flat, grad.reshape(rows, flat.shape[1], d), module.weight.shape)
        return None, {"weight": part}
