"""Attack losses with their gradients with respect to the logits, in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = 1e-12  # keeps the denominators of the difference of logits ratios from zero

Pair = tuple[Tensor, Tensor]


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    """(B, 1) the logits of one class per row; classes (B, 1)."""
    return logits.gather(1, classes)


def _cross_entropy(logits: Tensor, y: Tensor, targets: Tensor | None) -> Pair:
    classes, sign = (y, -1.0) if targets is None else (targets, 1.0)
    logs = logits.log_softmax(1)
    value = sign * _of(logs, classes)[:, 0]
    gradient = logs.exp_().mul_(-sign)
    return value, gradient.scatter_add_(1, classes, gradient.new_full(classes.shape, sign))


def _other(logits: Tensor, classes: Tensor) -> Pair:
    """(B, 1) the largest logit of another class, and its gradient: equal ones share it, as `amax` has it."""
    others = logits.scatter(1, classes, -torch.inf)
    best = others.amax(1, keepdim=True)
    ties = (others == best).to(logits.dtype)
    return best, ties.div_(ties.sum(1, keepdim=True))


def _margin(logits: Tensor, y: Tensor, targets: Tensor | None) -> Pair:
    classes, sign = (y, 1.0) if targets is None else (targets, -1.0)
    best, gradient = _other(logits, classes)
    value = sign * (best - _of(logits, classes))[:, 0]
    return value, gradient.scatter_add_(1, classes, -torch.ones_like(best)).mul_(sign)


def _combined_targeted(logits: Tensor, y: Tensor, targets: Tensor | None) -> Pair:
    assert targets is not None
    value = _of(logits, targets) - _of(logits, y)
    gradient = torch.zeros_like(logits).scatter_(1, targets, 1.0)
    return value[:, 0], gradient.scatter_add_(1, y, -torch.ones_like(value))


def _ratio(
    numerator: Tensor, gradient: Tensor, denominator: Tensor, places: Tensor, weights: tuple[float, ...]
) -> Pair:
    """n/d and ∇n/d − (n/d²) ∇d, where ∇d has `weights` at the classes `places` (B, len(weights))."""
    value = numerator / denominator
    gradient.div_(denominator)
    back = -value / denominator
    return value[:, 0], gradient.scatter_add_(1, places, back * back.new_tensor(weights))


def _dlr(logits: Tensor, y: Tensor, targets: Tensor | None) -> Pair:
    top, places = logits.topk(3, dim=1)
    value, gradient = _margin(logits, y, None)
    denominator = top[:, :1] - top[:, 2:] + FLOOR
    return _ratio(value[:, None], gradient, denominator, places[:, ::2], (1.0, -1.0))


def _targeted_dlr(logits: Tensor, y: Tensor, targets: Tensor | None) -> Pair:
    top, places = logits.topk(4, dim=1)
    value, gradient = _combined_targeted(logits, y, targets)
    denominator = top[:, :1] - (top[:, 2:3] + top[:, 3:]) / 2 + FLOOR
    return _ratio(value[:, None], gradient, denominator, places[:, [0, 2, 3]], (1.0, -0.5, -0.5))


def _kl(logits: Tensor, reference: Tensor) -> Pair:
    clean, logs = reference.log_softmax(1), logits.log_softmax(1)
    p = clean.exp()
    value = clean.sub_(logs).mul_(p).sum(1)
    return value, logs.exp_().mul_(p.sum(1, keepdim=True)).sub_(p)


_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | None], Pair]] = {
    "cross-entropy": _cross_entropy,
    "margin": _margin,
    "dlr": _dlr,
    "targeted-dlr": _targeted_dlr,
    "combined-targeted": _combined_targeted,
}
LOSSES = (*_LOSSES, "kl")


_NEEDS = {"dlr": (3, "margin"), "targeted-dlr": (4, "combined-targeted")}
_INSTEAD = {"targeted-dlr": "dlr", "combined-targeted": "cross-entropy"}


def form(name: str, classes: int, targets: Tensor | None, reference: Tensor | None) -> str:
    """The loss that is meant: `dlr` with targets is `targeted-dlr`.

    Raises:
        ValueError: it is unknown, or lacks targets, a reference or classes.
    """
    if name not in LOSSES:
        raise ValueError(f"no closed gradient of the loss {name!r}; known are {', '.join(LOSSES)}")
    if name == "kl" and reference is None:
        raise ValueError("kl needs the clean points' logits as its reference")
    if name in _INSTEAD and targets is None:
        raise ValueError(f"{name} needs target classes; use {_INSTEAD[name]} where there are none")
    meant = "targeted-dlr" if name == "dlr" and targets is not None else name
    least, instead = _NEEDS.get(meant, (1, ""))
    if classes < least:
        raise ValueError(f"{meant} needs {least} classes, the model has {classes}; use {instead}")
    return meant


@torch.no_grad()
def loss_gradient(
    name: str, logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> Pair:
    """See `robust.cuda_ops.loss_gradient`."""
    meant = form(name, logits.shape[1], targets, reference)
    if meant == "kl":
        assert reference is not None
        return _kl(logits, reference)
    return _LOSSES[meant](logits, y[:, None], None if targets is None else targets[:, None])
