"""Input-output pairs queried from a black box: what a substitute is distilled from, without any label of the data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.errors import DataError, RobustError
from robust.rng import Draws, derive
from robust.threat import Bounds

if TYPE_CHECKING:
    from robust.oracle import Oracle
    from robust.rows import Source

_BATCH = 256


@dataclass(frozen=True)
class Pairs:
    """What was asked and what the model said.

    Attributes:
        x: (M, C, H, W) float32 images in the box, on the CPU.
        answers: (M, classes) log-probabilities where the model gives scores, else (M,) its labels.
        classes: how many the model has.
    """

    x: Tensor
    answers: Tensor
    classes: int

    @property
    def labels(self) -> Tensor:
        """(M,) the classes that the model predicted."""
        return self.answers if self.answers.dim() == 1 else self.answers.argmax(1)


def queried_pairs(
    oracle: Oracle,
    pool: Tensor | Source | None,
    n: int,
    *,
    seed: int = 0,
    shape: tuple[int, ...] | None = None,
) -> Pairs:
    """Pairs of inputs and a black box's answers, for distillation (Papernot et al. 2017, arXiv:1602.02697).

    Exactly n queries, answers that are no number included: those inputs are left out of the pairs.

    Args:
        oracle: who is asked; with labels only, it must know its number of classes.
        pool: any images (N, C, H, W) in the box that the attacker has, without labels (Knockoff Nets, Orekondy et al.
            2019, arXiv:1812.02766); each is asked about once, in keyed order, and where n is more, mixtures of two of
            them follow. None: synthetic images, see `synthetic`.
        n: how many to ask, at least 2.
        seed: keys the choice, the mixtures and the synthetic images.
        shape: (C, H, W) of one input, where there is no pool.

    Raises:
        BudgetExceeded: the oracle has fewer queries left; none is spent then.
    """
    if n < 2:
        raise RobustError(f"queries={n} teach nothing; give at least 2")
    if oracle.answers == "labels" and oracle.known_classes is None:
        raise RobustError(
            "an oracle that gives labels does not say how many classes there are; pass classes="
        )
    x = inputs(pool, n, seed, shape, oracle.bounds)
    if oracle.answers == "labels":
        answers = oracle.labels(x).cpu()
        finite = answers >= 0
    else:
        scores = oracle.scores(x).cpu()
        finite = scores.isfinite().all(1)
        answers = log_probabilities(scores)
    if int(finite.sum()) < 2:
        raise RobustError(
            f"{oracle.name} gave no usable answer to {n} queries; nothing can be learnt from it"
        )
    return Pairs(x[finite], answers[finite], oracle.classes)


def log_probabilities(scores: Tensor) -> Tensor:
    """(N, classes) log-probabilities from an oracle's scores: logits, or probabilities where all rows are such."""
    fine = scores[scores.isfinite().all(1)]
    if bool((fine >= 0).all()) and torch.allclose(fine.sum(1), torch.ones(len(fine)), atol=1e-3):
        return scores.clamp_min(1e-6).log().log_softmax(1)
    return scores.log_softmax(1)


def inputs(
    pool: Tensor | Source | None, n: int, seed: int, shape: tuple[int, ...] | None, bounds: Bounds
) -> Tensor:
    """(n, C, H, W) the inputs to ask about, see `queried_pairs`."""
    if pool is None:
        if shape is None:
            raise DataError("without a pool of images, give the shape of one input")
        return synthetic(n, shape, bounds, seed)
    if len(pool) == 0:
        raise DataError("the pool of images is empty; give at least one, or none for synthetic images")
    generator = torch.Generator().manual_seed(derive(seed, "pool"))
    order = torch.randperm(len(pool), generator=generator)[:n]
    first = _images(pool, order)
    if n <= len(first):
        return first
    draws = Draws(derive(seed, "pool"), "mix", torch.arange(n - len(first)))
    a, b = draws.below(len(first), 2).unbind(1)
    share = draws.at(1).uniform(1).view(-1, *[1] * (first.dim() - 1))
    mixed = share * first[a] + (1 - share) * first[b]
    return torch.cat((first, mixed.clamp(*bounds)))


def _images(pool: Tensor | Source, rows: Tensor) -> Tensor:
    if isinstance(pool, Tensor):
        return pool[rows.to(pool.device)].detach().cpu().float()
    parts = [pool.batch(part.tolist())[0].cpu().float() for part in rows.split(_BATCH)]
    return torch.cat(parts)


def synthetic(n: int, shape: tuple[int, ...], bounds: Bounds, seed: int) -> Tensor:
    """(n, *shape) images that nobody took: keyed random grids, smoothly enlarged, from two cells to every pixel.

    Image k overlays two grids, each of its own fineness, of colours uniform in the box, with a keyed share of each and
    a keyed contrast. Inputs that are no images (C, H, W) are uniform in the box.
    """
    identity = torch.arange(n)
    low, high = bounds
    if len(shape) != 3:
        return low + (high - low) * Draws(seed, "synthetic", identity).uniform(*shape)
    layers = [_layer(Draws(seed, f"synthetic/{k}", identity), shape) for k in (0, 1)]
    draws = Draws(seed, "synthetic", identity)
    share, contrast = draws.uniform(2).view(n, 2, 1, 1, 1).unbind(1)
    unit = share * layers[0] + (1 - share) * layers[1]
    centre = unit.mean((1, 2, 3), keepdim=True)
    spread = (unit - centre).abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
    stretched = centre + (unit - centre) * (1 - contrast + contrast * 0.5 / spread)
    return (low + (high - low) * stretched.clamp(0, 1)).float()


def _layer(draws: Draws, shape: tuple[int, ...]) -> Tensor:
    """Grids of 2, 3, 4, 6, … cells, enlarged to the images' size; images of one fineness together."""
    channels, height, width = shape
    full = max(height, width)
    sizes = [size for size in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48) if size < full] + [full]
    pick = draws.below(len(sizes), 1)[:, 0]
    found = torch.empty(len(pick), *shape)
    for k, size in enumerate(sizes):
        rows = (pick == k).nonzero()[:, 0]
        if len(rows):
            grid = Draws(draws.seed, f"{draws.stream}/grid", draws.identity[rows]).uniform(
                channels, min(size, height), min(size, width)
            )
            found[rows] = F.interpolate(grid, (height, width), mode="bilinear", align_corners=False)
    return found
