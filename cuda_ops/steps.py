"""The attacks' steps: x' = Π(x + size · direction(gradient)), fused where there is a kernel.

In all of them `at`, `origin`, `before`, `gradient` and `x` are float32 of one shape (B, …), `size`, `eps` and `alpha`
float32 (B,), `low` and `high` the model's box. A NaN in the gradient counts as 0; in l2 an infinite entry does too.
The points must be finite and below 1e9, as `robust.threat` hands them over. Other dtypes run the reference. All
return new tensors, through which no gradient flows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust.cuda_ops.dispatch import Backend, backend
from robust.cuda_ops.operators import Operator, alike, empty_alike, operator
from robust.cuda_ops.reference import steps as reference

DEFAULT: Backend = "triton"


def _plain(x: Tensor) -> bool:
    return x.dtype != torch.float32 or backend(x, DEFAULT) == "reference"


@torch.no_grad()
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
    """at + size · sign(gradient), onto |· − x| <= eps and the box (Madry et al. 2018, arXiv:1706.06083).

    Args:
        at, gradient, x: (B, …) where the step begins, its direction, the ball's centre.
        size, eps: (B,) length of the step and radius, in the unit of x.
        low, high: the box.
        mask: (B,) bool, the rows that move; the others keep `at`, bit for bit.

    Returns:
        (B, …) a new tensor: each coordinate exactly the nearest of ball ∩ box, as floats round x ± eps.
    """
    if _plain(x):
        return reference.step_linf(at, gradient, x, size, eps, low, high, mask)
    found: Tensor = _STEP_LINF(at, gradient, x, size, eps, low, high, mask)
    return found


@torch.no_grad()
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
    """at + size · gradient / ‖gradient‖₂, onto the Euclidean ball ∩ box; arguments as for `step_linf`.

    Returns:
        (B, …) the projection in one multiplier, to about 1e-6 of eps: it may exceed the ball by rounding, which the
        caller shrinks away. A gradient of zeros is no step.
    """
    if _plain(x):
        return reference.step_l2(at, gradient, x, size, eps, low, high, mask)
    found: Tensor = _STEP_L2(at, gradient, x, size, eps, low, high, mask)
    return found


@torch.no_grad()
def step_l1(
    at: Tensor,
    gradient: Tensor,
    x: Tensor,
    size: Tensor,
    eps: Tensor,
    low: float,
    high: float,
    keep: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """A sparse l1 step (Tramèr & Boneh 2019, arXiv:1904.13000), onto the l1 ball ∩ box (arXiv:2103.01208).

    Args:
        keep: (B,) fraction of the coordinates that share the step, the largest of the gradient and all that equal
            the last of them; at least one.

    The other arguments are `step_linf`'s, the result as for `step_l2`.
    """
    if _plain(x):
        return reference.step_l1(at, gradient, x, size, eps, low, high, keep, mask)
    found: Tensor = _STEP_L1(at, gradient, x, size, eps, low, high, keep, mask)
    return found


@torch.no_grad()
def momentum(gradient: Tensor, velocity: Tensor, decay: float) -> Tensor:
    """decay · velocity + gradient / ‖gradient‖₁ per row (MI-FGSM, Dong et al. 2018, arXiv:1710.06081).

    Args:
        gradient, velocity: (B, …) float32; what is not finite in a gradient that has such an entry counts as 0.
        decay: the paper's μ, at least 0.

    Returns:
        (B, …) the new velocity; a gradient of zeros adds nothing.
    """
    if _plain(gradient):
        return reference.momentum(gradient, velocity, decay)
    found: Tensor = _MOMENTUM(gradient, velocity, decay)
    return found


@torch.no_grad()
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
    """Auto-PGD's step with two terms (Croce & Hein 2020, arXiv:2003.01690, eq. 2).

    z = Π(origin + size · sign(g)), then Π(origin + alpha (z − origin) + (1 − alpha)(origin − before)).

    Args:
        origin, before: (B, …) this iterate and the last one; gradient, x: (B, …).
        size, eps: (B,) length of the step and radius, in the unit of x.
        alpha: (B,) in [0, 1], weight of the new step; 1 where there is no last iterate.
        low, high: the box.
    """
    if _plain(x):
        return reference.apgd_linf(origin, before, gradient, x, size, eps, alpha, low, high)
    found: Tensor = _APGD_LINF(origin, before, gradient, x, size, eps, alpha, low, high)
    return found


@torch.no_grad()
def apgd_l2(
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
    """Auto-PGD's step in l2; arguments as for `apgd_linf`, the projections as in `step_l2`."""
    if _plain(x):
        return reference.apgd_l2(origin, before, gradient, x, size, eps, alpha, low, high)
    found: Tensor = _APGD_L2(origin, before, gradient, x, size, eps, alpha, low, high)
    return found


@torch.no_grad()
def apgd_l1(
    origin: Tensor,
    before: Tensor,
    gradient: Tensor,
    x: Tensor,
    size: Tensor,
    eps: Tensor,
    alpha: Tensor,
    low: float,
    high: float,
    keep: Tensor,
) -> Tensor:
    """Auto-PGD's two terms with the sparse l1 step; arguments as for `apgd_linf` and `step_l1`."""
    if _plain(x):
        return reference.apgd_l1(origin, before, gradient, x, size, eps, alpha, low, high, keep)
    found: Tensor = _APGD_L1(origin, before, gradient, x, size, eps, alpha, low, high, keep)
    return found


def _row(values: Tensor | None, made: Tensor, mask: bool) -> Tensor | None:
    """One number per row, as kernels read it."""
    if values is None:
        return None
    return values.to(torch.bool if mask else torch.float32).expand(len(made)).contiguous()


def _launch(norm: str, values: dict[str, Any]) -> Tensor:
    """Runs the kernel of a norm; `values` holds the public function's arguments by name."""
    names = ("at", "gradient", "x") if "at" in values else ("origin", "gradient", "x", "before")
    points = alike(*(values[name] for name in names))
    made = torch.empty_like(points[0])
    if not made.numel():
        return made
    numbers = {name: values.get(name) for name in ("size", "eps", "alpha", "keep", "mask")}
    rows = {name: _row(value, made, name == "mask") for name, value in numbers.items()}
    if backend(made, DEFAULT) == "cuda":
        from robust.cuda_ops import cuda

        cuda.step(norm, made, points, rows, values["low"], values["high"])
    else:
        from robust.cuda_ops.kernels import steps as kernels

        kernels.step(norm, made, points, rows, values["low"], values["high"])
    return made


_POINTS = ("at", "origin", "before", "gradient", "x")


def _register(name: str, arguments: str) -> Operator:
    """The operator of a step, from its arguments in order."""
    names = arguments.split()
    norm = name.partition("_")[2]
    kinds = {"low": "float", "high": "float", "mask": "Tensor?"}
    schema = ", ".join(f"{kinds.get(argument, 'Tensor')} {argument}" for argument in names)

    def body(*given: Any) -> Tensor:
        return _launch(norm, dict(zip(names, given, strict=True)))

    def fake(*given: Any) -> Tensor:
        return empty_alike(*(value for name, value in zip(names, given, strict=True) if name in _POINTS))

    return operator(name, f"({schema}) -> Tensor", body, fake)


def _momentum_body(gradient: Tensor, velocity: Tensor, decay: float) -> Tensor:
    gradient, velocity = alike(gradient, velocity)
    made = torch.empty_like(gradient)
    if not made.numel():
        return made
    if backend(made, DEFAULT) == "cuda":
        from robust.cuda_ops import cuda

        cuda.momentum(made, gradient, velocity, decay)
    else:
        from robust.cuda_ops.kernels import steps as kernels

        kernels.momentum(made, gradient, velocity, decay)
    return made


def _momentum_fake(gradient: Tensor, velocity: Tensor, decay: float) -> Tensor:
    return empty_alike(gradient, velocity)


_STEP_LINF = _register("step_linf", "at gradient x size eps low high mask")
_STEP_L2 = _register("step_l2", "at gradient x size eps low high mask")
_STEP_L1 = _register("step_l1", "at gradient x size eps low high keep mask")
_APGD_LINF = _register("apgd_linf", "origin before gradient x size eps alpha low high")
_APGD_L2 = _register("apgd_l2", "origin before gradient x size eps alpha low high")
_APGD_L1 = _register("apgd_l1", "origin before gradient x size eps alpha low high keep")
_MOMENTUM = operator(
    "momentum", "(Tensor gradient, Tensor velocity, float decay) -> Tensor", _momentum_body, _momentum_fake
)
