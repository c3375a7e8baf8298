"""The attacks' steps, each projected on ball ∩ box: in place on one buffer of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from robust.cuda_ops.reference.projections import onto_l1, onto_l2, onto_linf

SMALLEST = 1e-38  # what a gradient's largest entry counts as at least
SHORTEST = 1e-12  # likewise the length of a gradient whose largest entry is one
THINNEST = 1e-30  # likewise the absolute sum of a gradient in `momentum`


def _column(values: Tensor, like: Tensor) -> Tensor:
    """(B,) as (B, 1, …, 1) beside `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def _kept(mask: Tensor | None, moved: Tensor, at: Tensor) -> Tensor:
    """`moved` where the mask says so, `at` elsewhere."""
    return moved if mask is None else torch.where(_column(mask, at), moved, at)


def _steepest_linf(gradient: Tensor) -> Tensor:
    return gradient.sign()


def _steepest_l2(gradient: Tensor) -> Tensor:
    """Length one; tiny gradients are scaled up before they are squared."""
    flat = gradient.abs()
    largest = flat.amax(1, keepdim=True).clamp_min_(SMALLEST)
    if not bool(largest.isfinite().all()):
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        largest = gradient.abs().amax(1, keepdim=True).clamp_min_(SMALLEST)
    torch.div(gradient, largest, out=flat)
    return flat.div_(flat.norm(2, 1, keepdim=True).clamp_min_(SHORTEST))


def _steepest_l1(gradient: Tensor, keep: Tensor) -> Tensor:
    """Signs of the largest `keep` of the coordinates, scaled to length one (Tramèr & Boneh 2019)."""
    size = gradient.abs()
    if not bool(size.amax(1).isfinite().all()):
        gradient = gradient.nan_to_num()
        size = gradient.abs()
    count = (keep * size.shape[1]).long().clamp_(1, size.shape[1])
    ranked = size.topk(int(count.max()), dim=1).values if len(size) else size
    threshold = ranked.gather(1, (count - 1)[:, None])
    signs = gradient.sign().mul_(size >= threshold)
    return signs.div_(torch.abs(signs, out=size).sum(1, keepdim=True).clamp_min_(1))


def _two_terms(moved: Tensor, origin: Tensor, before: Tensor, alpha: Tensor) -> Tensor:
    """origin + α (moved − origin) + (1 − α) (origin − before), in place of `moved`."""
    inertia = torch.sub(origin, before).mul_(1 - alpha)
    return moved.sub_(origin).mul_(alpha).add_(origin).add_(inertia)


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
    """See `robust.cuda_ops.step_linf`."""
    moved = _steepest_linf(gradient).mul_(_column(size, x)).add_(at)
    return _kept(mask, onto_linf(moved, x, _column(eps, x), low, high), at)


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
    """See `robust.cuda_ops.step_l2`."""
    moved = _steepest_l2(gradient.flatten(1)).mul_(size[:, None]).add_(at.flatten(1))
    return _kept(mask, onto_l2(moved, x.flatten(1), eps[:, None], low, high).view(at.shape), at)


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
    """See `robust.cuda_ops.step_l1`."""
    moved = _steepest_l1(gradient.flatten(1), keep).mul_(size[:, None]).add_(at.flatten(1))
    return _kept(mask, onto_l1(moved, x.flatten(1), eps[:, None], low, high).view(at.shape), at)


@torch.no_grad()
def momentum(gradient: Tensor, velocity: Tensor, decay: float) -> Tensor:
    """See `robust.cuda_ops.momentum`."""
    scaled = gradient.abs()
    length = scaled.flatten(1).sum(1)
    if not bool(length.isfinite().all()):
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        length = gradient.abs().flatten(1).sum(1)
    torch.div(gradient, _column(length.clamp_min_(THINNEST), gradient), out=scaled)
    return (decay * velocity).add_(scaled)


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
    """See `robust.cuda_ops.apgd_linf`."""
    radius = _column(eps, x)
    moved = _steepest_linf(gradient).mul_(_column(size, x)).add_(origin)
    moved = onto_linf(moved, x, radius, low, high)
    return onto_linf(_two_terms(moved, origin, before, _column(alpha, x)), x, radius, low, high)


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
    """See `robust.cuda_ops.apgd_l2`."""
    shape, radius = x.shape, eps[:, None]
    origin, before, gradient, x = (t.flatten(1) for t in (origin, before, gradient, x))
    moved = onto_l2(_steepest_l2(gradient).mul_(size[:, None]).add_(origin), x, radius, low, high)
    return onto_l2(_two_terms(moved, origin, before, alpha[:, None]), x, radius, low, high).view(shape)


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
    """See `robust.cuda_ops.apgd_l1`."""
    shape, radius = x.shape, eps[:, None]
    origin, before, gradient, x = (t.flatten(1) for t in (origin, before, gradient, x))
    moved = onto_l1(_steepest_l1(gradient, keep).mul_(size[:, None]).add_(origin), x, radius, low, high)
    return onto_l1(_two_terms(moved, origin, before, alpha[:, None]), x, radius, low, high).view(shape)
