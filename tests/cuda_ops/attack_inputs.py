"""Inputs that the attacks' kernels must get right, and how far they are from the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from robust.cuda_ops.case import Case
from robust.cuda_ops.cases_attacks import CASES

CPU = torch.device("cpu")
# One number, a row shorter than a warp, one over a power of two, a CIFAR image; the losses take the width as classes.
SHAPES = ((1, 1), (1, 9), (3, 7), (3, 65), (5, 3072))
CLASSES = ((5, 2), (5, 3), (5, 4), (7, 10), (3, 37), (2, 1000))


def wide(value: Any) -> Any:
    """A floating-point tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def variants(name: str, rows: int, elements: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """The case's own inputs, and with rows that are masked, have no gradient, NaN in it, or no ball to stay in."""
    case = CASES[name]
    seed = rows + elements
    yield "plain", dict(case.make(rows, elements, seed, CPU))
    if name in ("step_linf", "step_l2", "step_l1"):
        yield "masked", {**case.make(rows, elements, seed, CPU), "mask": torch.arange(rows) % 2 == 1}
    if name.startswith("loss"):
        return
    odd = dict(case.make(rows, elements, seed + 1, CPU))
    odd["gradient"][0] = 0
    odd["gradient"][-1, -1] = torch.nan
    if rows > 2:
        odd["gradient"][1] *= 1e-30
    if "eps" in odd and rows > 2:
        odd["eps"][2] = torch.inf
    yield "odd", odd


def error(case: Case, arguments: Mapping[str, Any]) -> float:
    """Largest error relative to the largest number of the float64 reference; inf where anything else is wrong."""
    before = {key: value.clone() for key, value in arguments.items() if isinstance(value, Tensor)}
    found, expected = (
        case.operation(**arguments),
        case.reference(**{k: wide(v) for k, v in arguments.items()}),
    )
    changed = any(not torch.allclose(arguments[k], v, 0, 0, equal_nan=True) for k, v in before.items())
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    worst = torch.inf if changed else 0.0
    for mine, theirs in pairs:
        if mine.shape != theirs.shape or mine.dtype != torch.float32 or not bool(mine.isfinite().all()):
            return torch.inf
        worst = max(worst, float((mine.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)))
    return worst


def wrong(shapes: Mapping[str, tuple[tuple[int, int], ...]]) -> dict[str, float]:
    """The inputs whose error is above their case's tolerance; `shapes` by the case's name."""
    return {
        f"{name} {rows}x{elements} {label}": found
        for name, chosen in shapes.items()
        for rows, elements in chosen
        for label, arguments in variants(name, rows, elements)
        if not (found := error(CASES[name], arguments)) <= CASES[name].tolerance
    }


def inexact() -> list[str]:
    """The linf steps, which have no sums, where a kernel is not the float32 reference bit for bit."""
    return [
        f"{name} {rows}x{elements} {label}"
        for name in ("step_linf", "apgd_linf")
        for rows, elements in SHAPES
        for label, arguments in variants(name, rows, elements)
        if not torch.equal(CASES[name].operation(**arguments), CASES[name].reference(**arguments))
    ]


def odd_logits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(12, 5) logits that are NaN or infinite in turn, or equal; labels, targets, and clean logits."""
    nan, inf = torch.nan, torch.inf
    rows = [
        *([nan, 1, 2, 3, 4], [1, nan, 2, 3, 4], [1, 2, 3, 4, nan], [nan] * 5),
        *([inf, 1, 2, 3, 4], [1, inf, 2, 3, 0], [1, 2, 3, inf, inf], [-inf, 1, 2, 3, 4]),
        *([1, -inf, 2, 3, 0], [1, 2, -inf, -inf, 5], [-inf] * 5, [1, 2, 2, 1, 0]),
    ]
    logits = torch.tensor(rows)
    y = torch.zeros(len(rows), dtype=torch.long)
    return logits, y, y + 1, logits.flip(0)
