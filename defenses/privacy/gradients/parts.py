"""The gradients of B samples with respect to one parameter, in the form in which they are cheapest.

Each form knows its samples' norms and a weighted sum over the samples; only `rows` writes all of them out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robust.cuda_ops import clip_accumulate, per_sample_norm

_SLACK = 8.0  # units of rounding that a norm from Gram matrices is raised by


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and sums are taken: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Shares:
    """What each sample's gradient is divided by.

    Attributes:
        lengths: (B,), at least 1, infinite for samples that add nothing.
        weights: (B,) one over them.
        sound: whether all are finite.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.lengths, self.weights = lengths, 1 / lengths
        self.sound = bool(lengths.isfinite().all())

    def cleared(self, values: Tensor) -> Tensor:
        """`values` (B, …) with zeros for samples that add nothing: 0 · NaN would be NaN."""
        if self.sound:
            return values
        return values.masked_fill(self.lengths.isinf().view(-1, *[1] * (values.ndim - 1)), 0)


class Part(ABC):
    """Per-sample gradients of one parameter."""

    @abstractmethod
    def norm(self) -> Tensor:
        """(B,) Euclidean norms, never below the true ones by more than rounding."""

    @abstractmethod
    def weighted(self, shares: Shares) -> Tensor:
        """Σ g_i / lengths_i in the parameter's shape, in float32 or float64."""

    @abstractmethod
    def rows(self) -> Tensor:
        """(B, …) all gradients, written out."""


class Rows(Part):
    """Gradients that are written out, (B, d, …).

    Args:
        norms: (B,) their norms, if they are known.
        order: how the dimensions behind d lie in the parameter, where they were written in another order.
    """

    def __init__(self, grads: Tensor, norms: Tensor | None = None, order: tuple[int, ...] = ()) -> None:
        self.grads, self.order = grads, order
        self._norm = per_sample_norm(grads) if norms is None else norms  # now, while they are in the cache

    def norm(self) -> Tensor:
        """See `Part`."""
        return self._norm

    def weighted(self, shares: Shares) -> Tensor:
        """See `Part`."""
        flat = self.grads.reshape(len(self.grads), self.grads[:1].numel())
        if shares.sound and not flat.is_cuda and flat.dtype == shares.weights.dtype:
            summed = shares.weights @ flat  # what `clip_accumulate` does, without computing the weights again
        else:
            summed, _ = clip_accumulate(flat, shares.lengths, 1.0)
        return self._ordered(summed.view(1, *self.grads.shape[1:]))[0]

    def rows(self) -> Tensor:
        """See `Part`."""
        return self._ordered(self.grads)

    def _ordered(self, grads: Tensor) -> Tensor:
        return grads.permute(0, 1, *(2 + axis for axis in self.order)) if self.order else grads


class Outer(Part):
    """The gradient of a matrix, Σ_t g_t a_tᵀ, from what a product took and gave: (B, T, p) and (B, T, d).

    The norm is that of Gram matrices (Goodfellow 2015, arXiv:1510.01799; Li et al. 2022, arXiv:2110.05679), the sum one
    product over samples and positions (book-keeping, Bu et al. 2023, arXiv:2210.00038).

    Args:
        shape: of the parameter, d·p numbers.
    """

    def __init__(self, inputs: Tensor, grads: Tensor, shape: torch.Size) -> None:
        self.inputs, self.grads, self.shape = inputs, grads, shape
        self._norm = self._gram()

    def _gram(self) -> Tensor:
        dtype = wide(self.grads.dtype)
        a, g = self.inputs.to(dtype), self.grads.to(dtype)
        if a.shape[1] == 1:
            return per_sample_norm(a) * per_sample_norm(g)
        squared = (torch.bmm(a, a.mT) * torch.bmm(g, g.mT)).sum((1, 2))
        # Terms of both signs may cancel: the norm is raised by what rounding can have taken from it.
        slack = _SLACK * torch.finfo(dtype).eps * (a.square().sum((1, 2)) * g.square().sum((1, 2)))
        return (squared.clamp_min(0) + slack).sqrt()

    def norm(self) -> Tensor:
        """See `Part`."""
        return self._norm

    def weighted(self, shares: Shares) -> Tensor:
        """See `Part`."""
        dtype = wide(self.grads.dtype)
        a, g = (shares.cleared(part.to(dtype)) for part in (self.inputs, self.grads))
        g = g * shares.weights.to(dtype)[:, None, None]
        return (g.flatten(0, 1).mT @ a.flatten(0, 1)).view(self.shape)

    def rows(self) -> Tensor:
        """See `Part`."""
        return torch.bmm(self.grads.mT, self.inputs).view(len(self.grads), *self.shape)


class Lookup(Part):
    """The gradient of an embedding's table, from indices (B, T), -1 for none, and the gradients (B, T, d) of what they
    looked up."""

    def __init__(self, index: Tensor, grads: Tensor, shape: torch.Size) -> None:
        self.index, self.grads, self.shape = index, grads, shape
        self._norm = self._distinct()

    def _distinct(self) -> Tensor:
        """Each sample's norm over the distinct rows of the table that it looked up."""
        count = len(self.index)
        dtype = wide(self.grads.dtype)
        if self.index.numel() == 0:
            return torch.zeros(count, dtype=dtype, device=self.grads.device)
        sample = torch.arange(count, device=self.index.device)[:, None]
        keys = (sample * (self.shape[0] + 1) + self.index + 1).flatten()
        distinct, place = keys.unique(return_inverse=True)
        sums = torch.zeros(len(distinct), self.shape[1], dtype=dtype, device=self.grads.device)
        sums.index_add_(0, place, self._kept().flatten(0, 1).to(dtype))
        owner = torch.div(distinct, self.shape[0] + 1, rounding_mode="floor")
        squared = torch.zeros(count, dtype=dtype, device=sums.device)
        return squared.index_add_(0, owner, sums.square().sum(1)).sqrt_()

    def _kept(self) -> Tensor:
        return self.grads.masked_fill((self.index < 0)[..., None], 0)

    def norm(self) -> Tensor:
        """See `Part`."""
        return self._norm

    def weighted(self, shares: Shares) -> Tensor:
        """See `Part`."""
        dtype = wide(self.grads.dtype)
        g = shares.cleared(self._kept().to(dtype)) * shares.weights.to(dtype)[:, None, None]
        table = torch.zeros(self.shape, dtype=dtype, device=g.device)
        return table.index_add_(0, self.index.clamp_min(0).flatten(), g.flatten(0, 1))

    def rows(self) -> Tensor:
        """See `Part`."""
        table = self.grads.new_zeros(len(self.index), *self.shape)
        where = self.index.clamp_min(0)[..., None].expand_as(self.grads)
        return table.scatter_add_(1, where, self._kept())


def add(parts: list[Part]) -> Part:
    """The gradients of a parameter that was used several times: the sum over its uses."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].rows()
    for part in parts[1:]:
        total = total + part.rows()
    return Rows(total)
