"""How samples' gradients are clipped: flat, per layer, automatic, or with an adaptive bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.errors import ConfigError
from robust.recipe import require


@dataclass(frozen=True, kw_only=True)
class Clipping:
    """Flat clipping: each sample's whole gradient is scaled down to at most max_grad_norm (Abadi et al. 2016,
    arXiv:1607.00133).

    Attributes:
        max_grad_norm: the bound on a sample's Euclidean norm, above 0: the sensitivity of the sum.
    """

    name: ClassVar[str] = "flat"
    counts: ClassVar[bool] = False  # whether `moved` wants to know of the unclipped samples
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require("max_grad_norm", self.max_grad_norm, 0 < self.max_grad_norm < math.inf, "positive and finite")

    def sensitivity(self, bound: float) -> float:
        """The largest Euclidean norm that one sample adds to the sum, while the bound is `bound`."""
        return bound

    def lengths(self, norms: Tensor, bound: float) -> tuple[Tensor, float]:
        """What each sample's gradient is divided by, at least 1, and what the sum is multiplied with.

        Args:
            norms: (P, B) of each parameter's gradients.
            bound: the present bound.

        Returns:
            (B,), or (P, B) where parameters are clipped apart, infinite for gradients that are not finite: they add
            nothing; and the factor.
        """
        return finite((joint(norms) / bound).clamp_min(1)), 1.0

    def gradient_noise(self, noise_multiplier: float) -> float:
        """The noise multiplier of the gradients, where `noise_multiplier` is that of the whole step."""
        return noise_multiplier

    def moved(self, bound: float, unclipped: float, expected: float, normal: float) -> float:
        """The next step's bound; `unclipped` samples were within this one's, `normal` is a fresh standard normal."""
        return bound


Flat = Clipping


@dataclass(frozen=True, kw_only=True)
class PerLayer(Clipping):
    """Per-layer clipping: each parameter has a bound of its own (McMahan et al. 2018, arXiv:1710.06963).

    Attributes:
        max_grad_norms: a bound for each trainable parameter, in the model's order; empty for equal ones that amount to
            `max_grad_norm` together. The sensitivity is the root of the sum of their squares.
    """

    name: ClassVar[str] = "per_layer"
    max_grad_norms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """See `Clipping`."""
        super().__post_init__()
        good = all(0 < bound < math.inf for bound in self.max_grad_norms)
        require("max_grad_norm", list(self.max_grad_norms), good, "positive and finite for every parameter")

    def sensitivity(self, bound: float) -> float:
        """See `Clipping`."""
        return math.sqrt(sum(c * c for c in self.max_grad_norms)) if self.max_grad_norms else bound

    def lengths(self, norms: Tensor, bound: float) -> tuple[Tensor, float]:
        """See `Clipping`."""
        count = len(norms)
        if self.max_grad_norms and len(self.max_grad_norms) != count:
            raise ConfigError(
                f"max_grad_norm has {len(self.max_grad_norms)} bounds for {count} trainable parameters; "
                "give one for each"
            )
        each = norms.new_tensor(self.max_grad_norms or [bound / math.sqrt(count)] * count)
        lengths = (norms / each[:, None]).clamp_min(1)
        sound = norms.isfinite().all(0)  # a sample with one infinite gradient is left out of all parameters
        return finite(torch.where(sound, lengths, torch.inf)), 1.0


@dataclass(frozen=True, kw_only=True)
class Automatic(Clipping):
    """Automatic clipping, AUTO-S: g · max_grad_norm / (‖g‖ + γ) (Bu et al. 2023, arXiv:2206.07136).

    Every gradient is scaled to nearly max_grad_norm, so that the bound is no hyper-parameter any more: with most
    optimizers it only scales the learning rate, and 1 is as good as any.

    Attributes:
        gamma: the stability constant, above 0; the paper's 0.01.
    """

    name: ClassVar[str] = "automatic"
    gamma: float = 0.01

    def __post_init__(self) -> None:
        """See `Clipping`."""
        super().__post_init__()
        require("gamma", self.gamma, 0 < self.gamma < math.inf, "positive and finite")

    def lengths(self, norms: Tensor, bound: float) -> tuple[Tensor, float]:
        """See `Clipping`."""
        return finite((joint(norms) + self.gamma) / self.gamma), bound / self.gamma


@dataclass(frozen=True, kw_only=True)
class Adaptive(Clipping):
    """Adaptive clipping: the bound follows a quantile of the norms, by a noisy count (Andrew et al. 2021,
    arXiv:1905.03871, algorithm 1).

    The step's noise_multiplier covers both releases: gradients get (z⁻² − (2 σ_b)⁻²)^(-1/2) times their bound, which is
    a little more than z, so that an accountant takes noise_multiplier for the step as it stands.

    Attributes:
        max_grad_norm: the first bound.
        target_unclipped_quantile: the fraction γ of samples that should not be clipped.
        clipbound_learning_rate: η of the geometric update.
        unclipped_num_std: σ_b, standard deviation of the noise on the number of unclipped samples, above half the noise
            multiplier; the paper takes a twentieth of the expected batch.
        min_clipbound, max_clipbound: where the bound stays.
    """

    name: ClassVar[str] = "adaptive"
    counts: ClassVar[bool] = True
    target_unclipped_quantile: float = 0.5
    clipbound_learning_rate: float = 0.2
    unclipped_num_std: float = 10.0
    min_clipbound: float = 1e-3
    max_clipbound: float = 1e8

    def __post_init__(self) -> None:
        """See `Clipping`."""
        super().__post_init__()
        quantile, low, high = self.target_unclipped_quantile, self.min_clipbound, self.max_clipbound
        require("target_unclipped_quantile", quantile, 0 <= quantile <= 1, "in [0, 1]")
        rate = self.clipbound_learning_rate
        require("clipbound_learning_rate", rate, 0 <= rate < math.inf, "0 or more")
        require("unclipped_num_std", self.unclipped_num_std, self.unclipped_num_std > 0, "above 0")
        inside = 0 < low <= self.max_grad_norm <= high
        require("max_grad_norm", self.max_grad_norm, inside, f"within [{low:g}, {high:g}]")

    def gradient_noise(self, noise_multiplier: float) -> float:
        """See `Clipping`.

        Raises:
            ConfigError: the count alone costs more than the whole step may.
        """
        if noise_multiplier == 0:
            return 0.0
        if 2 * self.unclipped_num_std <= noise_multiplier:
            raise ConfigError(
                f"unclipped_num_std={self.unclipped_num_std:g} spends more than "
                f"noise_multiplier={noise_multiplier:g} allows; it must be above {noise_multiplier / 2:g}"
            )
        return float((noise_multiplier**-2 - (2 * self.unclipped_num_std) ** -2) ** -0.5)

    def moved(self, bound: float, unclipped: float, expected: float, normal: float) -> float:
        """See `Clipping`; `unclipped` is Σ (1[‖g‖ ≤ C] − 1/2), which one sample changes by 1/2."""
        fraction = (unclipped + self.unclipped_num_std * normal) / expected + 0.5
        step = self.clipbound_learning_rate * (fraction - self.target_unclipped_quantile)
        return min(max(bound * math.exp(-step), self.min_clipbound), self.max_clipbound)


CLIPPINGS = {kind.name: kind for kind in (Clipping, PerLayer, Automatic, Adaptive)}


def joint(norms: Tensor) -> Tensor:
    """(B,) norms of whole gradients from those of their parts (P, B)."""
    found: Tensor = torch.linalg.vector_norm(norms, dim=0)
    return found


def finite(lengths: Tensor) -> Tensor:
    """Lengths with infinity for NaN."""
    return lengths.masked_fill(lengths != lengths, torch.inf)
