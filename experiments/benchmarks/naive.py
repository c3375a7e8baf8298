"""Fused operations as people write them: one PyTorch call after another, each of which moves whole tensors.

Keyed by the public function's name. They mean the same up to rounding, except that l2 steps cut the ball first and
then the box, as the peers do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.dim() - 1))


def _masked(made: Tensor, at: Tensor, mask: Tensor | None) -> Tensor:
    return made if mask is None else torch.where(_column(mask, at), made, at)


def _cut(points: Tensor, x: Tensor, eps: Tensor, low: float, high: float) -> Tensor:
    delta = torch.clamp(points - x, min=-_column(eps, x), max=_column(eps, x))
    return torch.clamp(x + delta, min=low, max=high)


def _length(values: Tensor) -> Tensor:
    return _column(values.flatten(1).norm(dim=1), values).clamp_min(1e-12)


def step_linf(
    at: Tensor,
    gradient: Tensor,
    x: Tensor,
    size: Tensor,
    eps: Tensor,
    low: float,
    high: float,
    mask: Tensor | None = None,
) -> Tensor:
    """See `robust.cuda_ops.step_linf`."""
    return _masked(_cut(at + _column(size, x) * gradient.sign(), x, eps, low, high), at, mask)


def step_l2(
    at: Tensor,
    gradient: Tensor,
    x: Tensor,
    size: Tensor,
    eps: Tensor,
    low: float,
    high: float,
    mask: Tensor | None = None,
) -> Tensor:
    """See `robust.cuda_ops.step_l2`."""
    delta = at + _column(size, x) * gradient / _length(gradient) - x
    delta = delta * torch.clamp(_column(eps, x) / _length(delta), max=1.0)
    return _masked(torch.clamp(x + delta, min=low, max=high), at, mask)


def momentum(gradient: Tensor, velocity: Tensor, decay: float) -> Tensor:
    """See `robust.cuda_ops.momentum`."""
    total = gradient.flatten(1).abs().sum(1)
    return decay * velocity + gradient / _column(total, gradient).clamp_min(1e-12)


def apgd_linf(
    origin: Tensor,
    before: Tensor,
    gradient: Tensor,
    x: Tensor,
    size: Tensor,
    eps: Tensor,
    alpha: Tensor,
    low: float,
    high: float,
) -> Tensor:
    """See `robust.cuda_ops.apgd_linf`."""
    z = _cut(origin + _column(size, x) * gradient.sign(), x, eps, low, high)
    weight = _column(alpha, x)
    return _cut(origin + weight * (z - origin) + (1 - weight) * (origin - before), x, eps, low, high)


def cross_entropy(
    logits: Tensor, y: Tensor, targets: Tensor | None = None, **others: Any
) -> tuple[Tensor, Tensor]:
    """See `robust.cuda_ops.loss_gradient`: autograd's way, for the loss that PyTorch has."""
    leaf = logits.detach().requires_grad_(True)
    value = F.cross_entropy(leaf, y if targets is None else targets, reduction="none")
    value = value if targets is None else -value
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


NAIVE: dict[str, Callable[..., Any]] = {
    "step_linf": step_linf,
    "step_l2": step_l2,
    "momentum": momentum,
    "apgd_linf": apgd_linf,
}


def naive_of(operation: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any] | None:
    """The composition for an operation and its arguments; None where people have no other way than its reference."""
    name = getattr(operation, "__name__", "")
    if name == "loss_gradient":
        return cross_entropy if arguments.get("name") == "cross-entropy" else None
    return NAIVE.get(name)
