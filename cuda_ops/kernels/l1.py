# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Steps in l1: the largest coordinates of the gradient, ball ∩ box, and APGD's second term, a program per row.

The k-th largest entry is found by bisection on the bits of the absolute values, which are ordered as the numbers are:
it is exact, and it ends early where a bound has k entries above it. The rest is as in `l2`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust.cuda_ops.kernels.steps import _boxed, _mixed, _sign
from robust.cuda_ops.reference.projections import INWARD, ROUNDS

_INWARD, _ROUNDS = tl.constexpr(INWARD), tl.constexpr(ROUNDS)
_CLOSE = tl.constexpr(2e-7)  # of the bracket's upper end: where the two ends are one number


@triton.jit
def _bits(gradient, there):
    """Absolute values as integers of the same order: NaN is 0, what is not there comes last."""
    size = tl.where(gradient == gradient, tl.abs(gradient), 0.0)
    return tl.where(there, size.to(tl.int32, bitcast=True), -1)


@triton.jit
def _count(keep, n):
    """How many coordinates a step takes: truncated as in the reference, at least one."""
    return tl.minimum(tl.maximum((keep * n).to(tl.int32), 1), n)


@triton.jit
def _halved(least, beyond, middle, above, count):
    """The bracket [least, beyond) of the k-th largest, once `above` entries are known to reach `middle`."""
    beyond = tl.where(above == count, middle + 1, tl.where(above > count, beyond, middle))
    return tl.where(above >= count, middle, least), beyond


@triton.jit
def _solved_l1(t, low, high, over, eps):
    near = tl.abs(over) <= eps * (_INWARD / 2)
    return near | (high - low <= _CLOSE * high) | ((t == 0) & (over <= eps * _INWARD))


@triton.jit
def _next_l1(t, low, high, over, slope):
    """Newton's step inside the bracket, the bracket's middle otherwise; and the new bracket."""
    low = tl.where(over > 0, t, low)
    high = tl.where(over > 0, high, t)
    newton = t + over / tl.maximum(slope, 1.0)
    valid = (newton > low) & (newton < high) & (slope > 0)
    return tl.where(valid, newton, (low + high) / 2), low, high


@triton.jit
def _shrunk(x, moved, t, low, high):
    """x + _sign(delta) max(|delta| − t, 0) in the box."""
    delta = moved - x
    return _boxed(x + _sign(delta) * tl.maximum(tl.abs(delta) - t, 0.0), low, high)


@triton.jit
def _onto_l1(moved, x, eps, low, high):
    size = tl.abs(moved - x)
    cap = tl.abs(_boxed(moved, low, high) - x)
    target = eps * (1 - _INWARD)
    most = tl.max(size)
    t = most * 0.0
    least = t
    over = tl.sum(tl.minimum(size, cap)) - target
    rounds = 0
    while (rounds < _ROUNDS) & (_solved_l1(t, least, most, over, eps) == 0):
        left = tl.maximum(size - t, 0.0)
        taken = tl.minimum(left, cap)
        slope = tl.sum(_sign(tl.minimum(left, cap - taken)))
        t, least, most = _next_l1(t, least, most, over, slope)
        over = tl.sum(tl.minimum(tl.maximum(size - t, 0.0), cap)) - target
        rounds += 1
    return _shrunk(x, moved, t, low, high)


@triton.jit
def _held(
    made, at, gradient, x, before, size, eps, alpha, keep, mask, n, low, high,
    MASKED: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    there = column < n
    place = row * n + column
    origin = tl.load(at + place, mask=there, other=0.0)
    slope = tl.load(gradient + place, mask=there, other=0.0)
    centre = tl.load(x + place, mask=there, other=0.0)
    bits = _bits(slope, there)
    count = _count(tl.load(keep + row), n)
    least = count * 0
    beyond = tl.max(bits) + 1
    while beyond - least > 1:
        middle = least + (beyond - least) // 2
        above = tl.sum((bits >= middle).to(tl.int32))
        least, beyond = _halved(least, beyond, middle, above, count)
    chosen = tl.where(bits >= least, _sign(slope), 0.0)
    length = tl.maximum(tl.sum(tl.abs(chosen)), 1.0)
    radius = tl.load(eps + row)
    moved = _onto_l1(origin + tl.load(size + row) * (chosen / length), centre, radius, low, high)
    if TWO:
        last = tl.load(before + place, mask=there, other=0.0)
        moved = _onto_l1(_mixed(moved, origin, last, tl.load(alpha + row)), centre, radius, low, high)
    if MASKED:
        moved = tl.where(tl.load(mask + row) != 0, moved, origin)
    tl.store(made + place, moved, mask=there)


@triton.jit
def _point_l1(
    at, gradient, x, before, place, there, least, factor, first, weight, low, high, STAGE: tl.constexpr
):
    """A run of the step (stage 0), or of APGD's mixture behind its projection `first` (stage 1); and of x."""
    origin = tl.load(at + place, mask=there, other=0.0)
    centre = tl.load(x + place, mask=there, other=0.0)
    slope = tl.load(gradient + place, mask=there, other=0.0)
    moved = origin + factor * tl.where(_bits(slope, there) >= least, _sign(slope), 0.0)
    if STAGE == 1:
        last = tl.load(before + place, mask=there, other=0.0)
        moved = _mixed(_shrunk(centre, moved, first, low, high), origin, last, weight)
    return moved, centre


@triton.jit
def _shrink_l1(
    at, gradient, x, before, base, n: tl.constexpr, chosen, factor, first, weight, eps, low, high,
    STAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    parts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        moved, centre = _point_l1(
            at, gradient, x, before, base + start + column, start + column < n,
            chosen, factor, first, weight, low, high, STAGE,
        )  # fmt: skip
        parts = tl.maximum(parts, tl.abs(moved - centre))
    most = tl.max(parts)
    target = eps * (1 - _INWARD)
    t = most * 0.0
    least = t
    rounds = 0
    solved = most <= 0
    while (rounds < _ROUNDS) & (solved == 0):
        parts = tl.zeros((BLOCK,), tl.float32)
        slopes = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            moved, centre = _point_l1(
                at, gradient, x, before, base + start + column, start + column < n,
                chosen, factor, first, weight, low, high, STAGE,
            )  # fmt: skip
            cap = tl.abs(_boxed(moved, low, high) - centre)
            left = tl.maximum(tl.abs(moved - centre) - t, 0.0)
            taken = tl.minimum(left, cap)
            parts += taken
            slopes += _sign(tl.minimum(left, cap - taken))
        over = tl.sum(parts) - target
        solved = _solved_l1(t, least, most, over, eps)
        following, lower, upper = _next_l1(t, least, most, over, tl.sum(slopes))
        t = tl.where(solved, t, following)
        least = tl.where(solved, least, lower)
        most = tl.where(solved, most, upper)
        rounds += 1
    return t


@triton.jit
def _kth(gradient, base, n: tl.constexpr, count, BLOCK: tl.constexpr):
    """Bits of the `count`-th largest absolute value of a row."""
    column = tl.arange(0, BLOCK)
    least = count * 0
    beyond = least + 0x7F800001
    while beyond - least > 1:
        middle = least + (beyond - least) // 2
        parts = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, n, BLOCK):
            there = start + column < n
            bits = _bits(tl.load(gradient + base + start + column, mask=there, other=0.0), there)
            parts += (bits >= middle).to(tl.int32)
        least, beyond = _halved(least, beyond, middle, tl.sum(parts), count)
    return least


@triton.jit
def _long(
    made, at, gradient, x, before, size, eps, alpha, keep, mask, n: tl.constexpr, low, high,
    MASKED: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * n
    column = tl.arange(0, BLOCK)
    chosen = _kth(gradient, base, n, _count(tl.load(keep + row), n), BLOCK)
    parts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        there = start + column < n
        slope = tl.load(gradient + base + start + column, mask=there, other=0.0)
        parts += tl.where(_bits(slope, there) >= chosen, tl.abs(_sign(slope)), 0.0)
    factor = tl.load(size + row) / tl.maximum(tl.sum(parts), 1.0)
    radius = tl.load(eps + row)
    weight = 1.0
    first = 0.0
    t = _shrink_l1(
        at, gradient, x, before, base, n, chosen, factor, first, weight, radius, low, high, 0, BLOCK
    )  # fmt: skip
    if TWO:
        first = t
        weight = tl.load(alpha + row)
        t = _shrink_l1(
            at, gradient, x, before, base, n, chosen, factor, first, weight, radius, low, high, 1, BLOCK
        )  # fmt: skip
    for start in range(0, n, BLOCK):
        place = base + start + column
        there = start + column < n
        moved, centre = _point_l1(
            at, gradient, x, before, place, there, chosen, factor, first, weight, low, high, TWO
        )  # fmt: skip
        moved = _shrunk(centre, moved, t, low, high)
        if MASKED:
            moved = tl.where(tl.load(mask + row) != 0, moved, tl.load(at + place, mask=there, other=0.0))
        tl.store(made + place, moved, mask=there)


KERNELS = (_held, _long)  # for rows that stay in registers, and for longer ones
