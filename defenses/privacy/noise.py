"""The noise of private steps: how much of it, step by step, and where it comes from."""

from __future__ import annotations

import hashlib
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from robust.cuda_ops import noise_batch
from robust.recipe import require
from robust.rng import stream_key

Schedule = Callable[[int], float]
"""A noise multiplier for every step, from 0."""


@dataclass(frozen=True, kw_only=True)
class TimeDecay:
    """σ_t = start / (1 + rate · t): noise that falls with time.

    Attributes:
        start: the first noise multiplier, at least 0.
        rate: at least 0.
    """

    start: float
    rate: float

    def __post_init__(self) -> None:
        _multiplier(self.start)
        require("rate", self.rate, 0 <= self.rate < math.inf, "0 or more")

    def __call__(self, step: int) -> float:
        """The noise multiplier of a step."""
        return self.start / (1 + self.rate * step)


@dataclass(frozen=True, kw_only=True)
class StepDecay:
    """σ_t = start · gamma^⌊t / step_size⌋: noise that falls in steps.

    Attributes:
        start: the first noise multiplier, at least 0.
        gamma: factor, above 0.
        step_size: optimizer steps from one fall to the next, 1 or more.
    """

    start: float
    gamma: float
    step_size: int

    def __post_init__(self) -> None:
        _multiplier(self.start)
        require("gamma", self.gamma, 0 < self.gamma < math.inf, "positive")
        require("step_size", self.step_size, self.step_size >= 1, "1 or more")

    def __call__(self, step: int) -> float:
        """The noise multiplier of a step."""
        return float(self.start * self.gamma ** (step // self.step_size))


@dataclass(frozen=True, kw_only=True)
class ExponentialDecay:
    """σ_t = start · exp(-rate · t): noise that falls exponentially.

    Attributes:
        start: the first noise multiplier, at least 0.
        rate: at least 0; ln 2 / rate steps halve the noise.
    """

    start: float
    rate: float

    def __post_init__(self) -> None:
        _multiplier(self.start)
        require("rate", self.rate, 0 <= self.rate < math.inf, "0 or more")

    def __call__(self, step: int) -> float:
        """The noise multiplier of a step."""
        return self.start * math.exp(-self.rate * step)


def multiplier_at(noise_multiplier: float | Schedule, step: int) -> float:
    """The noise multiplier of a step, whether it is a number or a schedule."""
    value = noise_multiplier(step) if callable(noise_multiplier) else noise_multiplier
    _multiplier(value)
    return float(value)


def _multiplier(value: float) -> None:
    require("noise_multiplier", value, 0 <= value < math.inf, "0 (no privacy) or more, and finite")


# -- sources ----------------------------------------------------------------------------------------------------


class Noise(ABC):
    """Where standard normals come from."""

    @abstractmethod
    def add(self, flat: Tensor, std: float, step: int) -> Tensor:
        """(n,) float `flat` with independent noise of standard deviation `std` on every number."""

    @abstractmethod
    def normal(self, step: int, value: float) -> float:
        """One standard normal for the number `value`, independent of those of `add`."""

    @abstractmethod
    def chosen(self, count: int, rate: float, step: int) -> Tensor:
        """Indices (B,) int64, ascending, of a Poisson sample: each of `count` with probability at most `rate`."""


@dataclass
class KeyedNoise(Noise):
    """Counter-based noise (Philox): a function of seed and step, so that a resumed training draws the same.

    Whoever knows the seed can take the noise away again: keep it as secret as the data. A resumed training sets it.

    Attributes:
        by_sum: whether noise is a function of the numbers that it covers, too. Then two different sums never get the
            same noise, which their difference would be free of, not even where a copy of a training goes on with
            another loss, library or rounding. (A signature's nonce is made from its message for the same reason,
            RFC 6979.)
    """

    seed: int
    by_sum: bool = False

    def add(self, flat: Tensor, std: float, step: int) -> Tensor:
        """See `Noise`."""
        if flat.is_cuda:
            who = torch.zeros(1, dtype=torch.int64, device=flat.device)
            key = stream_key(self.seed, self._stream("dp-noise", flat))
            return noise_batch(flat[None], std, who, step, key)[0]
        kind: Any = np.float64 if flat.dtype == torch.float64 else np.float32
        drawn = self._draws(self._stream("dp-noise", flat), step).standard_normal(flat.numel(), dtype=kind)
        return torch.from_numpy(drawn).mul_(std).add_(flat)

    def normal(self, step: int, value: float) -> float:
        """See `Noise`."""
        stream = self._stream("dp-count", torch.tensor([value], dtype=torch.float64))
        return float(self._draws(stream, step).standard_normal())

    def chosen(self, count: int, rate: float, step: int) -> Tensor:
        """See `Noise`; number i of a step's stream is sample i's."""
        uniforms = self._draws("dp-sample", step).random(count)
        return torch.from_numpy(
            (uniforms < math.floor(rate * 2**53) * 2.0**-53).nonzero()[0].astype(np.int64)
        )

    def _stream(self, name: str, covered: Tensor) -> str:
        if not self.by_sum:
            return name
        if covered.is_cuda:
            return f"{name}/{content_key(covered)}"
        return f"{name}/{hashlib.blake2b(covered.contiguous().numpy().data, digest_size=16).hexdigest()}"

    def _draws(self, stream: str, step: int) -> np.random.Generator:
        """numpy's Philox at the place of a step: its streams are long, and drawn in C."""
        low, high = stream_key(self.seed, stream)
        key = np.array([low | high << 32, step], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


def content_key(flat: Tensor) -> int:
    """A number of 64 bits that depends on every number of (n,) float `flat` and on its place, without leaving its
    device: bits and places are multiplied and folded twice, and added up modulo 2^64."""
    bits = flat.view(torch.int64 if flat.dtype == torch.float64 else torch.int32).long()
    mixed = bits + torch.arange(1, len(bits) + 1, device=flat.device) * _ODD[0]
    for odd in _ODD[1:]:
        mixed = (mixed ^ (mixed >> 32)) * odd
    return int((mixed ^ (mixed >> 32)).sum())


# Odd numbers below 2^63 (those of splitmix64 and of the golden ratio), whose products wrap.
_ODD = (0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9, 0x14D049BB133111EB)


@dataclass(frozen=True)
class SecureNoise(Noise):
    """Noise from the operating system's cryptographic generator, safe from attacks on floating point.

    A normal is half the sum of four, so that its bits do not tell of one draw (Holohan & Braghin 2021,
    arXiv:2107.10138, section 5.1); it is added in float64, and the result is rounded. It cannot be drawn again: a
    resumed training goes on with other noise.
    """

    def add(self, flat: Tensor, std: float, step: int) -> Tensor:
        """See `Noise`."""
        noise = torch.from_numpy(self._normals(flat.numel())).to(flat.device)
        return flat.double().add_(noise, alpha=std).to(flat.dtype)

    def normal(self, step: int, value: float) -> float:
        """See `Noise`."""
        return float(self._normals(1)[0])

    def chosen(self, count: int, rate: float, step: int) -> Tensor:
        """See `Noise`."""
        words = np.frombuffer(os.urandom(8 * count), np.uint64) >> np.uint64(11)
        return torch.from_numpy((words < math.floor(rate * 2**53)).nonzero()[0].astype(np.int64))

    def _normals(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        total = np.zeros(count)
        for _ in range(4):
            words = np.frombuffer(os.urandom(16 * -(-count // 2)), np.uint64).reshape(2, -1)
            first, second = ((word >> np.uint64(11)).astype(np.float64) for word in words)
            radius, angle = np.sqrt(-2 * np.log((first + 1) * 2.0**-53)), second * (2 * np.pi * 2.0**-53)
            total += np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
        return total / 2
