"""Attack losses with the gradient that their backward pass starts from: one launch instead of a small graph."""

from __future__ import annotations

import torch
from torch import Tensor

from robust.cuda_ops.dispatch import Backend, backend
from robust.cuda_ops.operators import operator
from robust.cuda_ops.reference.losses import form
from robust.cuda_ops.reference.losses import loss_gradient as plain

DEFAULT: Backend = "triton"


@torch.no_grad()
def loss_gradient(
    name: str, logits: Tensor, y: Tensor, targets: Tensor | None = None, reference: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """An attack's loss per row and its gradient with respect to the logits, in closed form.

    Args:
        name: "cross-entropy", "margin", "dlr", "targeted-dlr", "combined-targeted" or "kl", as in `robust.losses`.
        logits: (B, K) float32; y: (B,) int64 classes in [0, K).
        targets: (B,) int64 classes that the loss pulls towards, for its targeted form.
        reference: (B, K) logits of the clean points, for "kl".

    Returns:
        The value (B,), larger is better for the attacker, and its gradient (B, K). Equal logits share the gradient of
        a maximum; which of equal logits a ratio's denominator takes is open. A row that is not finite has the value
        that `robust.losses` gives it, and any gradient.

    Raises:
        ValueError: the loss is unknown, or lacks targets, a reference or classes.
    """
    meant = form(name, logits.shape[1], targets, reference)
    if logits.dtype != torch.float32 or backend(logits, DEFAULT) == "reference":
        return plain(name, logits, y, targets, reference)
    value, gradient = _LOSS_GRADIENT(meant, logits, y, targets, reference)
    return value, gradient


def _body(
    name: str, logits: Tensor, y: Tensor, targets: Tensor | None, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    logits, y = logits.contiguous(), y.long().contiguous()
    targets = None if targets is None else targets.long().contiguous()
    clean = reference.float().contiguous() if reference is not None and name == "kl" else None
    for given, shape in ((y, logits.shape[:1]), (targets, logits.shape[:1]), (clean, logits.shape)):
        if given is not None and given.shape != shape:
            raise ValueError(
                f"labels, targets or reference of shape {tuple(given.shape)}, not {tuple(shape)}"
            )
    value, gradient = logits.new_empty(logits.shape[0]), torch.empty_like(logits)
    if not logits.numel():
        return value, gradient
    if backend(logits, DEFAULT) == "cuda":
        from robust.cuda_ops import cuda

        cuda.loss_gradient(name, value, gradient, logits, y, targets, clean)
    else:
        from robust.cuda_ops.kernels import losses as kernels

        kernels.loss_gradient(name, value, gradient, logits, y, targets, clean)
    return value, gradient


def _fake(
    name: str, logits: Tensor, y: Tensor, targets: Tensor | None, reference: Tensor | None
) -> tuple[Tensor, Tensor]:
    return logits.new_empty(logits.shape[0]), torch.empty_like(logits, memory_format=torch.contiguous_format)


_LOSS_GRADIENT = operator(
    "loss_gradient",
    "(str name, Tensor logits, Tensor y, Tensor? targets, Tensor? reference) -> (Tensor, Tensor)",
    _body,
    _fake,
)
