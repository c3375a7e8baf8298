# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Steps in l2: direction, ball ∩ box, and APGD's second term, a program per row.

The equation is the reference's: u with Σ min(u · wish, cap) = eps², by Newton's method. A row that fits is held in
registers, so that every tensor moves once. A longer one is walked in runs, and the point is computed anew on every
pass: the threads write nothing that others would have to read. Its length is a constant of the compiled kernel, since
the interpreter of some Triton versions takes no tensor in a range.
"""

from __future__ import annotations

import triton
import triton.language as tl

from robust.cuda_ops.kernels.steps import _boxed, _finite, _mixed
from robust.cuda_ops.reference.projections import EXACT, INWARD, ROUNDS, TINY
from robust.cuda_ops.reference.steps import SHORTEST

_TINY, _INWARD = tl.constexpr(TINY), tl.constexpr(INWARD)
_EXACT, _ROUNDS = tl.constexpr(EXACT), tl.constexpr(ROUNDS)
_SHORTEST = tl.constexpr(SHORTEST)
_SMALLEST = tl.constexpr(
    1.2e-38
)  # a gradient's largest entry: the smallest normal number, which no GPU flushes


@triton.jit
def _target_l2(eps):
    radius = eps * (1 - _INWARD)
    return radius * radius


@triton.jit
def _solved_l2(u, taken, target):
    return (target - taken <= _EXACT * target) | (u >= 1)


@triton.jit
def _next_l2(u, taken, slope, target):
    return tl.where(slope > 0, tl.minimum(u + (target - taken) / tl.maximum(slope, _TINY), 1.0), 1.0)


@triton.jit
def _between(x, moved, weight, low, high):
    """x + weight (moved − x), exact at both ends."""
    delta = moved - x
    return _boxed(tl.where(weight < 0.5, x + weight * delta, moved - delta * (1 - weight)), low, high)


@triton.jit
def _onto_l2(moved, x, eps, low, high):
    delta = moved - x
    room = _boxed(moved, low, high) - x
    wish = delta * delta
    cap = room * room
    target = _target_l2(eps)
    u = tl.minimum(target / tl.maximum(tl.sum(wish), _TINY), 1.0)
    taken = tl.minimum(wish * u, cap)
    total = tl.sum(taken)
    rounds = 0
    while (rounds < _ROUNDS) & (_solved_l2(u, total, target) == 0):
        u = _next_l2(u, total, tl.sum(tl.where(cap > taken, wish, 0.0)), target)
        taken = tl.minimum(wish * u, cap)
        total = tl.sum(taken)
        rounds += 1
    return _between(x, moved, tl.sqrt(u), low, high)


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
    slope = _finite(tl.load(gradient + place, mask=there, other=0.0))
    centre = tl.load(x + place, mask=there, other=0.0)
    slope = slope / tl.maximum(tl.max(tl.abs(slope)), _SMALLEST)
    slope = slope / tl.maximum(tl.sqrt(tl.sum(slope * slope)), _SHORTEST)
    radius = tl.load(eps + row)
    moved = _onto_l2(origin + tl.load(size + row) * slope, centre, radius, low, high)
    if TWO:
        last = tl.load(before + place, mask=there, other=0.0)
        moved = _onto_l2(_mixed(moved, origin, last, tl.load(alpha + row)), centre, radius, low, high)
    if MASKED:
        moved = tl.where(tl.load(mask + row) != 0, moved, origin)
    tl.store(made + place, moved, mask=there)


@triton.jit
def _point_l2(
    at, gradient, x, before, place, there, largest, factor, first, weight, low, high, STAGE: tl.constexpr
):
    """A run of the step (stage 0), or of APGD's mixture behind its projection `first` (stage 1); and of x."""
    origin = tl.load(at + place, mask=there, other=0.0)
    centre = tl.load(x + place, mask=there, other=0.0)
    slope = _finite(tl.load(gradient + place, mask=there, other=0.0))
    moved = origin + slope / largest * factor
    if STAGE == 1:
        last = tl.load(before + place, mask=there, other=0.0)
        moved = _mixed(_between(centre, moved, first, low, high), origin, last, weight)
    return moved, centre


@triton.jit
def _scale_l2(
    at, gradient, x, before, base, n: tl.constexpr, largest, factor, first, weight, eps, low, high,
    STAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    parts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        moved, centre = _point_l2(
            at, gradient, x, before, base + start + column, start + column < n,
            largest, factor, first, weight, low, high, STAGE,
        )  # fmt: skip
        parts += (moved - centre) * (moved - centre)
    target = _target_l2(eps)
    u = tl.minimum(target / tl.maximum(tl.sum(parts), _TINY), 1.0)
    rounds = 0
    solved = u >= 1
    while (rounds < _ROUNDS) & (solved == 0):
        parts = tl.zeros((BLOCK,), tl.float32)
        slopes = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, n, BLOCK):
            moved, centre = _point_l2(
                at, gradient, x, before, base + start + column, start + column < n,
                largest, factor, first, weight, low, high, STAGE,
            )  # fmt: skip
            wish = (moved - centre) * (moved - centre)
            room = _boxed(moved, low, high) - centre
            taken = tl.minimum(wish * u, room * room)
            parts += taken
            slopes += tl.where(room * room > taken, wish, 0.0)
        total = tl.sum(parts)
        solved = _solved_l2(u, total, target)
        u = tl.where(solved, u, _next_l2(u, total, tl.sum(slopes), target))
        rounds += 1
    return tl.sqrt(u)


@triton.jit
def _long(
    made, at, gradient, x, before, size, eps, alpha, keep, mask, n: tl.constexpr, low, high,
    MASKED: tl.constexpr, TWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    base = row * n
    column = tl.arange(0, BLOCK)
    parts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        slope = tl.load(gradient + base + start + column, mask=start + column < n, other=0.0)
        parts = tl.maximum(parts, tl.abs(_finite(slope)))
    largest = tl.maximum(tl.max(parts), _SMALLEST)
    parts = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        slope = tl.load(gradient + base + start + column, mask=start + column < n, other=0.0)
        slope = _finite(slope) / largest
        parts += slope * slope
    factor = tl.load(size + row) / tl.maximum(tl.sqrt(tl.sum(parts)), _SHORTEST)
    radius = tl.load(eps + row)
    weight = 1.0
    first = 1.0
    scale = _scale_l2(
        at, gradient, x, before, base, n, largest, factor, first, weight, radius, low, high, 0, BLOCK
    )  # fmt: skip
    if TWO:
        first = scale
        weight = tl.load(alpha + row)
        scale = _scale_l2(
            at, gradient, x, before, base, n, largest, factor, first, weight, radius, low, high, 1, BLOCK
        )  # fmt: skip
    for start in range(0, n, BLOCK):
        place = base + start + column
        there = start + column < n
        moved, centre = _point_l2(
            at, gradient, x, before, place, there, largest, factor, first, weight, low, high, TWO
        )  # fmt: skip
        moved = _between(centre, moved, scale, low, high)
        if MASKED:
            moved = tl.where(tl.load(mask + row) != 0, moved, tl.load(at + place, mask=there, other=0.0))
        tl.store(made + place, moved, mask=there)


KERNELS = (_held, _long)  # for rows that stay in registers, and for longer ones
