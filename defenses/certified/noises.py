"""The noises of randomised smoothing: how they are drawn, and the radius that a probability proves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robust.cuda_ops import noise_batch
from robust.defenses.certified.binomial import Array
from robust.rng import Draws, stream_key

Add = Callable[[Tensor, float, Tensor, Tensor, int, str, int], Tensor]


@dataclass(frozen=True)
class Noise:
    """A distribution of independent coordinates with standard deviation sigma.

    Attributes:
        norm: of the radii.
        add: (x (B, …), sigma, identity (B,), first step (B,), seed, stream, copies) to (B · copies, …) noisy copies.
        radius: (lower bound of the class's probability, sigma) to the radius within which it stays the first.
        probability: (radius, sigma) to the probability that proves it; the inverse.
    """

    norm: str
    add: Add
    radius: Callable[[Array, float], Array]
    probability: Callable[[float, float], float]


def _gaussian(
    x: Tensor, sigma: float, identity: Tensor, first: Tensor, seed: int, stream: str, copies: int
) -> Tensor:
    return noise_batch(x, sigma, identity, first, stream_key(seed, stream), copies)


def _drawn(shape: Callable[[Tensor, float], Tensor]) -> Add:
    """Noise made of keyed uniforms in [0, 1), which are rare enough to need no kernel."""

    def add(
        x: Tensor, sigma: float, identity: Tensor, first: Tensor, seed: int, stream: str, copies: int
    ) -> Tensor:
        steps = (first[:, None] + torch.arange(copies, device=x.device)).flatten()
        uniform = Draws(seed, stream, identity.repeat_interleave(copies), steps).uniform(*x.shape[1:])
        return x.repeat_interleave(copies, 0) + shape(uniform, sigma).to(x)

    return add


def _laplace(uniform: Tensor, sigma: float) -> Tensor:
    """By the inverse distribution function, at the middle of each of the 2^24 steps."""
    centred = uniform + (2.0**-25 - 0.5)
    return centred.sign() * (1 - 2 * centred.abs()).log() * (-sigma / math.sqrt(2))


def _flat(uniform: Tensor, sigma: float) -> Tensor:
    return (2 * uniform - 1) * (math.sqrt(3) * sigma)


def _l2_radius(p: Array, sigma: float) -> Array:
    from scipy.special import ndtri

    found: Array = np.maximum(sigma * ndtri(np.maximum(p, 0.5)), 0.0)
    return found


def _l2_probability(radius: float, sigma: float) -> float:
    from scipy.special import ndtr

    return float(ndtr(radius / sigma))


def _laplace_radius(p: Array, sigma: float) -> Array:
    found: Array = np.maximum(-sigma / math.sqrt(2) * np.log(2 * (1 - np.maximum(p, 0.5))), 0.0)
    return found


def _uniform_radius(p: Array, sigma: float) -> Array:
    return 2 * math.sqrt(3) * sigma * (np.maximum(p, 0.5) - 0.5)


# Cohen et al. 2019, theorem 1; Teng et al. 2020 and Yang et al. 2020 (arXiv:2002.08118, table 1) for l1.
NOISES = {
    "gaussian": Noise("l2", _gaussian, _l2_radius, _l2_probability),
    "laplace": Noise(
        "l1", _drawn(_laplace), _laplace_radius, lambda r, s: 1 - 0.5 * math.exp(-math.sqrt(2) * r / s)
    ),
    "uniform": Noise(
        "l1", _drawn(_flat), _uniform_radius, lambda r, s: min(0.5 + r / (2 * math.sqrt(3) * s), 1.0)
    ),
}
