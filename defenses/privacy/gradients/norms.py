"""Per-sample gradients of the scales and shifts of normalisations that keep samples apart."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from robust.defenses.privacy.gradients.arena import Arena
from robust.defenses.privacy.gradients.parts import Rows
from robust.defenses.privacy.gradients.rule import Parts, Rule, value


class GroupNorm(Rule):
    """Group and instance normalisation: B samples are one sample with B times the channels and groups.

    So the library's kernel, which sums over samples, gives each sample's own gradient at no further cost.
    """

    kinds = (nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

    def refuses(self, module: Any) -> str | None:
        """See `Rule`."""
        if getattr(module, "track_running_stats", False):
            return "track_running_stats keeps statistics of the samples without noise; switch it off"
        return None

    def prepare(self, module: Any, x: Tensor) -> Tensor:
        """See `Rule`."""
        return x.contiguous()

    def forward(self, module: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Rule`."""
        weight, bias, groups = value(module.weight, x), value(module.bias, x), _groups(module)
        if x.shape[1] % groups or len(x) == 0:
            raise ValueError(f"input {tuple(x.shape)} has no {groups} groups of channels")
        sizes = (len(x), x.shape[1], math.prod(x.shape[2:]), groups)
        out, mean, rstd = torch.native_group_norm(x, weight, bias, *sizes, module.eps)
        return out, (x, mean, rstd)

    def backward(
        self, module: Any, saved: tuple[Tensor, ...], grad: Tensor, wants_x: bool, arena: Arena
    ) -> tuple[Tensor | None, Parts]:
        """See `Rule`."""
        x, mean, rstd = saved
        weight = value(module.weight, x)
        assert weight is not None
        rows, channels, area, groups = len(x), x.shape[1], math.prod(x.shape[2:]), _groups(module)
        one = [part.reshape(1, rows * channels, area) for part in (grad.to(x.dtype), x)]
        stats = [part.reshape(1, rows * groups) for part in (mean, rstd)]
        sizes = (1, rows * channels, area, rows * groups)
        wanted = [wants_x, True, True]
        found = torch.ops.aten.native_group_norm_backward(*one, *stats, weight.repeat(rows), *sizes, wanted)
        parts: Parts = {
            "weight": Rows(found[1].view(rows, channels)),
            "bias": Rows(found[2].view(rows, channels)),
        }
        return (found[0].view(x.shape) if wants_x else None), parts


def _groups(module: Any) -> int:
    return int(module.num_groups if isinstance(module, nn.GroupNorm) else module.num_features)


class LayerNorm(Rule):
    """Layer normalisation over the last dimensions of (B, …)."""

    kinds = (nn.LayerNorm,)

    def forward(self, module: nn.LayerNorm, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Rule`."""
        weight, bias = value(module.weight, x), value(module.bias, x)
        out, mean, rstd = torch.native_layer_norm(x, module.normalized_shape, weight, bias, module.eps)
        return out, (x, mean, rstd)

    def backward(
        self, module: nn.LayerNorm, saved: tuple[Tensor, ...], grad: Tensor, wants_x: bool, arena: Arena
    ) -> tuple[Tensor | None, Parts]:
        """See `Rule`."""
        x, mean, rstd = saved
        shape, weight, bias = module.normalized_shape, value(module.weight, x), value(module.bias, x)
        grad_x = None
        if wants_x:
            mask = [True, False, False]
            settings = (list(shape), mean, rstd, weight, bias, mask)
            grad_x = torch.ops.aten.native_layer_norm_backward(grad.to(x.dtype), x, *settings)[0]
        between = tuple(range(1, x.ndim - len(shape)))
        product = grad * ((x - mean) * rstd)
        parts: Parts = {"weight": Rows(product.sum(between) if between else product)}
        if module.bias is not None:
            parts["bias"] = Rows(grad.sum(between) if between else grad)
        return grad_x, parts
