"""The attacks' operations with inputs for them: what the tests check and the benchmarks time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robust.cuda_ops import losses, reference, steps
from robust.cuda_ops.case import Arguments, Case

_BOTH = ("triton", "cuda")
_BOX = (0.0, 1.0)
# Radii per coordinate as attacks on CIFAR have them: 8/255, 0.5 and 12 at 3,072 coordinates.
_RADIUS: dict[str, Callable[[int], float]] = {
    "linf": lambda n: 8 / 255,
    "l2": lambda n: 0.5 * (n / 3072) ** 0.5,
    "l1": lambda n: 12 * n / 3072,
}


class _Draws:
    """Seeded numbers, the same on every device."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device)

    def classes(self, rows: int, classes: int) -> Tensor:
        return torch.randint(classes, (rows,), generator=self.generator).to(self.device)


def _moved(arguments: Arguments) -> int:
    """Every tensor is read once, and one like the largest is written."""
    sizes = [
        value.numel() * value.element_size() for value in arguments.values() if isinstance(value, Tensor)
    ]
    return sum(sizes) + max(sizes)


def _loss_moved(arguments: Arguments) -> int:
    """The logits are read (of combined-targeted two a row), the labels that matter, and value and gradient written."""
    name, logits = arguments["name"], arguments["logits"]
    rows, classes = logits.shape
    read = {"combined-targeted": 2, "kl": 2 * classes}.get(name, classes)
    both = name in ("targeted-dlr", "combined-targeted")
    labels = 0 if name == "kl" else 1 + both
    return int(rows * (4 * read + 8 * labels + 4 + 4 * classes))


def _step(norm: str, apgd: bool) -> Callable[[int, int, int, torch.device], Arguments]:
    """The maker of a step's inputs: iterates on the ball's surface, steps of 0.1 to 2.1 radii, radii that vary."""

    def make(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
        draws = _Draws(seed, device)
        x = draws.uniform(rows, elements)
        eps = _RADIUS[norm](elements) * (0.5 + draws.uniform(rows))
        keep = {"keep": draws.uniform(rows)} if norm == "l1" else {}
        walk: Callable[..., Tensor] = getattr(reference, f"step_{norm}")

        def start() -> Tensor:
            return walk(x, draws.normal(rows, elements), x, eps, eps, *_BOX, **keep)

        points = {"origin": start(), "before": start()} if apgd else {"at": start()}
        numbers: dict[str, Any] = {"size": eps * (0.1 + 2 * draws.uniform(rows)), "eps": eps}
        if apgd:
            numbers["alpha"] = 0.5 + 0.5 * draws.uniform(rows)
        gradient = draws.normal(rows, elements) * 1e-3
        return points | {"gradient": gradient, "x": x, **numbers, "low": _BOX[0], "high": _BOX[1], **keep}

    return make


def _momentum(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
    draws = _Draws(seed, device)
    gradient = draws.normal(rows, elements) * 1e-3
    return {"gradient": gradient, "velocity": draws.normal(rows, elements) / elements, "decay": 0.9}


def _loss(name: str, aimed: bool) -> Callable[[int, int, int, torch.device], Arguments]:
    """The maker of a loss's inputs; `elements` are the classes, at least as many as the loss needs."""
    least = {"dlr": 3, "targeted-dlr": 4}.get("targeted-dlr" if "dlr" in name and aimed else name, 2)

    def make(rows: int, elements: int, seed: int, device: torch.device) -> Arguments:
        draws, classes = _Draws(seed, device), max(elements, least)
        logits, clean = 3 * draws.normal(rows, classes), 3 * draws.normal(rows, classes)
        y = draws.classes(rows, classes)
        targets = (y + 1 + draws.classes(rows, classes - 1)) % classes
        return {
            "name": name,
            "logits": logits,
            "y": y,
            "targets": targets if aimed else None,
            "reference": clean if name == "kl" else None,
        }

    return make


STEPS: dict[str, Case] = {
    name: Case(
        operation=getattr(steps, name),
        reference=getattr(reference, name),
        make=_step(name.partition("_")[2], name.startswith("apgd")),
        moved=_moved,
        backends=_BOTH,
        tolerance=3e-7 if name.endswith("linf") else 1e-6,
    )
    for name in ("step_linf", "step_l2", "step_l1", "apgd_linf", "apgd_l2", "apgd_l1")
}
LOSSES: dict[str, Case] = {
    f"loss {name}{', targeted' if aimed and 'targeted' not in name else ''}": Case(
        operation=losses.loss_gradient,
        reference=reference.loss_gradient,
        make=_loss(name, aimed),
        moved=_loss_moved,
        backends=_BOTH,
    )
    for name, aimed in (
        ("cross-entropy", False),
        ("cross-entropy", True),
        ("margin", False),
        ("margin", True),
        ("dlr", False),
        ("targeted-dlr", True),
        ("combined-targeted", True),
        ("kl", False),
    )
}
CASES: dict[str, Case] = {
    **STEPS,
    "momentum": Case(
        operation=steps.momentum,
        reference=reference.momentum,
        make=_momentum,
        moved=_moved,
        backends=_BOTH,
    ),
    **LOSSES,
}
