"""Losses that attacks maximise, one value per row, by their registry names.

Every loss has the signature ``loss(logits, y, targets=None, reference=None) -> (B,)``: `logits` (B, K), `y` and
`targets` (B,) classes, `reference` (B, K) logits of the clean points. With `targets` a loss pulls towards the target
class, without it pushes away from `y`. All are written so that larger is better for the attacker.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from robust import cuda_ops
from robust.errors import RobustError
from robust.registry import Registry

_IN_REACH = 0.01  # probabilities of the goal far below this are out of reach
_OUT_OF_REACH = 0.1  # the weight of points out of reach


class Loss(Protocol):
    """What every row of the registry can be called as."""

    def __call__(
        self, logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
    ) -> Tensor:
        """One value per row, larger is better for the attacker."""
        ...


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None])[:, 0]


def best_other(logits: Tensor, y: Tensor) -> Tensor:
    """(B,) the largest logit of a class that is not `y`."""
    return logits.scatter(1, y[:, None], -torch.inf).amax(1)


def margin(
    logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """Margin loss max_{j≠y} z_j − z_y (Carlini & Wagner 2017, arXiv:1608.04644); with a target z_t − max_{j≠t} z_j."""
    if targets is None:
        return best_other(logits, y) - _of(logits, y)
    return _of(logits, targets) - best_other(logits, targets)


def cross_entropy(
    logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """Cross-entropy C(x, y), to be raised; towards a target −C(x, t)."""
    if targets is None:
        return F.cross_entropy(logits, y, reduction="none")
    return -F.cross_entropy(logits, targets, reduction="none")


def dlr(logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, arXiv:2003.01690, eq. 6): needs 3 classes.

    −(z_y − max_{j≠y} z_j) / (z_π1 − z_π3), unchanged when logits are shifted or scaled.
    """
    if targets is not None:
        return targeted_dlr(logits, y, targets)
    _needs(logits, 3, "dlr", "margin")
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + 1e-12)


def targeted_dlr(
    logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, arXiv:2003.01690, eq. 7): needs 4 classes and a target.

    −(z_y − z_t) / (z_π1 − (z_π3 + z_π4) / 2).
    """
    if targets is None:
        raise RobustError("targeted-dlr needs target classes; use dlr where there are none")
    _needs(logits, 4, "targeted-dlr", "combined-targeted")
    top = logits.topk(4, dim=1).values
    return (_of(logits, targets) - _of(logits, y)) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def combined_targeted(
    logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """Away from y and towards t at once: minimises −C(x, y) + C(x, t), that is, raises z_t − z_y."""
    if targets is None:
        raise RobustError("combined-targeted needs target classes; use cross-entropy where there are none")
    return _of(logits, targets) - _of(logits, y)


def kl(logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence KL(p(clean) ‖ p(x)) (Zhang et al. 2019, TRADES, arXiv:1901.08573)."""
    if reference is None:
        raise RobustError("kl needs the clean points' logits as its reference")
    clean = reference.log_softmax(1)
    return (clean.exp() * (clean - logits.log_softmax(1))).sum(1)


def escape(
    logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> Tensor:
    """Raises how many points reach the goal, p = 1 − p_y or p_t with a target: log(p + 0.01) + 0.1 log p.

    For changes that many points share. Cross-entropy spends most of its gradient on points that are lost already, or,
    with a target, on those that are out of reach; here both pull little, the latter still by a tenth, so that the
    gradient lives where a model is very sure. (Shafahi et al. 2020, arXiv:1811.11304, clip their loss likewise.)
    """
    if targets is None:
        goal = logits.scatter(1, y[:, None], -torch.inf).logsumexp(1) - logits.logsumexp(1)
    else:
        goal = _of(logits.log_softmax(1), targets)
    return (goal.exp() + _IN_REACH).log() + _OUT_OF_REACH * goal


def _needs(logits: Tensor, classes: int, name: str, instead: str) -> None:
    if logits.shape[1] < classes:
        raise RobustError(f"{name} needs {classes} classes, the model has {logits.shape[1]}; use {instead}")


_CLOSED = {
    cross_entropy: "cross-entropy",
    margin: "margin",
    dlr: "dlr",
    targeted_dlr: "targeted-dlr",
    combined_targeted: "combined-targeted",
    kl: "kl",
}


def with_gradient(
    loss: Loss, logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A loss (B,) and its gradient with respect to the logits (B, K): closed form or autograd."""
    if loss in _CLOSED:
        try:
            return cuda_ops.loss_gradient(_CLOSED[loss], logits, y, targets, reference)
        except ValueError as error:
            raise RobustError(str(error)) from None
    leaf = logits.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        value = loss(leaf, y, targets, reference)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


REGISTRY = Registry(
    "loss",
    {
        "cross-entropy": "robust.losses:cross_entropy",
        "margin": "robust.losses:margin",
        "dlr": "robust.losses:dlr",
        "targeted-dlr": "robust.losses:targeted_dlr",
        "combined-targeted": "robust.losses:combined_targeted",
        "kl": "robust.losses:kl",
        "escape": "robust.losses:escape",
    },
)
get = REGISTRY.load
