# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Attack losses and their logit gradients in Triton: one launch, a program per row, the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust.cuda_ops.reference.losses import FLOOR, LOSSES

_FLOOR = tl.constexpr(FLOOR)
_CROSS_ENTROPY = tl.constexpr(LOSSES.index("cross-entropy"))
_MARGIN = tl.constexpr(LOSSES.index("margin"))
_DLR = tl.constexpr(LOSSES.index("dlr"))
_TARGETED_DLR = tl.constexpr(LOSSES.index("targeted-dlr"))
_COMBINED = tl.constexpr(LOSSES.index("combined-targeted"))


@triton.jit
def _hot(column, label):
    return (column == label).to(tl.float32)


@triton.jit
def _at(logits, column, label):
    """The logit of one class; the others are chosen away, as an infinite one times 0 is NaN."""
    return tl.sum(tl.where(column == label, logits, 0.0))


@triton.jit
def _softmax(logits, there):
    """log softmax and softmax; 0 where there is no class. A row with NaN or +inf is NaN."""
    shifted = logits - tl.max(logits)
    powers = tl.where(there, tl.exp(shifted), 0.0)
    total = tl.sum(powers)
    return tl.where(there, shifted - tl.log(total), 0.0), powers / total


@triton.jit
def _margin(logits, column, there, label):
    """max over the other classes − the label's logit, and its gradient: equal logits share it."""
    others = tl.where(column == label, float("-inf"), logits)
    best = tl.max(others)
    ties = ((others == best) & there).to(tl.float32)
    return best - _at(logits, column, label), ties / tl.sum(ties) - _hot(column, label)


@triton.jit
def _largest(logits, column, BLOCK: tl.constexpr):
    """The largest logit and its class, the first of equal ones; and the row without it."""
    best = tl.max(logits)
    place = tl.min(tl.where(logits == best, column, BLOCK))
    return best, place, tl.where(column == place, float("-inf"), logits)


@triton.jit
def _ratio(value, gradient, below, below_gradient):
    ratio = value / below
    return ratio, gradient / below - ratio / below * below_gradient


@triton.jit
def _row(
    logits, clean, column, there, y, target, LOSS: tl.constexpr, AIMED: tl.constexpr, BLOCK: tl.constexpr
):
    """A row's value and gradient."""
    if LOSS == _CROSS_ENTROPY:
        logs, p = _softmax(logits, there)
        if AIMED:
            value, gradient = _at(logs, column, target), _hot(column, target) - p
        else:
            value, gradient = -_at(logs, column, y), p - _hot(column, y)
    elif LOSS == _MARGIN:
        if AIMED:
            value, gradient = _margin(logits, column, there, target)
            value, gradient = -value, -gradient
        else:
            value, gradient = _margin(logits, column, there, y)
    elif LOSS == _DLR:
        value, gradient = _margin(logits, column, there, y)
        first, place1, rest = _largest(logits, column, BLOCK)
        _second, _place2, rest = _largest(rest, column, BLOCK)
        third, place3, rest = _largest(rest, column, BLOCK)
        below = _hot(column, place1) - _hot(column, place3)
        value, gradient = _ratio(value, gradient, first - third + _FLOOR, below)
    elif LOSS == _TARGETED_DLR:
        value = _at(logits, column, target) - _at(logits, column, y)
        gradient = _hot(column, target) - _hot(column, y)
        first, place1, rest = _largest(logits, column, BLOCK)
        _second, _place2, rest = _largest(rest, column, BLOCK)
        third, place3, rest = _largest(rest, column, BLOCK)
        fourth, place4, rest = _largest(rest, column, BLOCK)
        below = _hot(column, place1) - (_hot(column, place3) + _hot(column, place4)) * 0.5
        value, gradient = _ratio(value, gradient, first - (third + fourth) / 2 + _FLOOR, below)
    else:
        logs, p = _softmax(logits, there)
        clean_logs, clean_p = _softmax(clean, there)
        value = tl.sum(tl.where(there, clean_p * (clean_logs - logs), 0.0))
        gradient = p * tl.sum(clean_p) - clean_p
    return value, gradient


@triton.jit
def _losses(
    values, gradients, logits, y, targets, reference, classes,
    LOSS: tl.constexpr, AIMED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < classes
    base = row * classes
    label = tl.load(y + row).to(tl.int32)
    target = label
    if AIMED:
        target = tl.load(targets + row).to(tl.int32)
    if LOSS == _COMBINED:  # two logits are all it needs
        value = tl.load(logits + base + target) - tl.load(logits + base + label)
        gradient = _hot(column, target) - _hot(column, label)
    else:
        scores = tl.load(logits + base + column, mask=there, other=float("-inf"))
        clean = scores
        if LOSS > _COMBINED:
            clean = tl.load(reference + base + column, mask=there, other=float("-inf"))
        value, gradient = _row(scores, clean, column, there, label, target, LOSS, AIMED, BLOCK)
        if (LOSS == _MARGIN) | (LOSS == _DLR) | (LOSS == _TARGETED_DLR):
            wrong = tl.sum((there & (scores != scores)).to(tl.int32))  # a maximum passes NaN by
            value = tl.where(wrong > 0, float("nan"), value)
    tl.store(values + row, value)
    tl.store(gradients + base + column, gradient, mask=there)


def loss_gradient(
    name: str,
    value: Tensor,
    gradient: Tensor,
    logits: Tensor,
    y: Tensor,
    targets: Tensor | None,
    reference: Tensor | None,
) -> None:
    """The loss `name` into `value` (B,), and its gradient into `gradient` (B, K).

    Args:
        name: as `robust.cuda_ops.reference.losses.form` says it.
        logits: (B, K) float32, not empty; y, targets: (B,) int64 classes; reference: (B, K) float32, for kl. All
            contiguous.
    """
    rows, classes = logits.shape
    width = triton.next_power_of_2(classes)
    with torch.cuda.device_of(logits):
        _losses[(rows,)](
            value,
            gradient,
            logits,
            y,
            targets,
            reference,
            classes,
            LOSS=LOSSES.index(name),
            AIMED=targets is not None,
            BLOCK=width,
            num_warps=min(max(width // 256, 1), 16),
            enable_fp_fusion=False,
        )
