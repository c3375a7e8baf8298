"""Keyed randomness: every draw is a function of (seed, sample, stream, step), never of the batch it shares.

A `Draws` names a place in that space; asking it twice gives the same numbers. Integers and uniforms are exact
on every device; normals agree to a few ulp.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from robust.cuda_ops import philox

_MASK = 0xFFFFFFFF
JOB_BITS = 20  # restarts × targets of one sample that get streams of their own


@lru_cache(maxsize=4096)
def _key(seed: int, stream: str) -> tuple[int, int]:
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """The Philox key of a stream, with which `robust.cuda_ops.noise_batch` draws what `Draws` would."""
    return _key(seed, stream)


def derive(seed: int, *names: int | str) -> int:
    """A seed of 63 bits for the stream `names` below `seed`, for generators that want one number."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own generators, which a randomised model draws from, seeded while open and as before afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def identities(index: Tensor, job: Tensor | int = 0) -> Tensor:
    """Row identities (B,) int64 from the samples' `index` (B,) and the number of their `job`."""
    return (index.long() << JOB_BITS) + job


@dataclass(frozen=True)
class Draws:
    """A keyed source for B rows.

    Attributes:
        seed: the recorded seed.
        stream: what the numbers are for ("start", "square", …).
        identity: (B,) int64, one per row.
        step: the row's own step, (B,) int64 or one number for all.
    """

    seed: int
    stream: str
    identity: Tensor
    step: Tensor | int = 0

    def bits(self, count: int) -> Tensor:
        """(B, count) int64 in [0, 2^32)."""
        identity = self.identity[:, None]
        step = self.step[:, None] if isinstance(self.step, Tensor) else torch.tensor(self.step).to(identity)
        blocks = torch.arange(-(-count // 4), device=identity.device)[None]
        counter = (blocks, step & _MASK, identity & _MASK, (identity >> 32) & _MASK)
        words = torch.stack(philox(counter, _key(self.seed, self.stream)), dim=-1)
        return words.flatten(1)[:, :count]

    def uniform(self, *shape: int) -> Tensor:
        """(B, *shape) float32 in [0, 1), with 24 random bits each."""
        values = (self.bits(math.prod(shape)) >> 8).float() * 2.0**-24
        return values.unflatten(1, shape) if shape else values[:, 0]

    def signs(self, *shape: int) -> Tensor:
        """(B, *shape) float32 in {-1, +1}."""
        values: Tensor = (self.bits(math.prod(shape)) >> 31).float().mul_(2).sub_(1).unflatten(1, shape)
        return values

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32 standard normals (Box-Muller)."""
        count = math.prod(shape)
        pairs = self.bits(2 * -(-count // 2)).unflatten(1, (-1, 2))
        radius = (((pairs[..., 0] >> 8) + 1).float() * 2.0**-24).log_().mul_(-2).sqrt_()
        angle = (pairs[..., 1] >> 8).float() * (2 * math.pi * 2.0**-24)
        values = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)[:, :count]
        shaped: Tensor = values.unflatten(1, shape)
        return shaped

    def below(self, high: Tensor | int, count: int) -> Tensor:
        """(B, count) int64 uniform on [0, high), `high` at most 2^31, one number or (B, 1)."""
        return (self.bits(count) * high) >> 32

    def branch(self, name: str) -> Draws:
        """A source for other numbers of the same rows and steps, independent of this one."""
        return Draws(self.seed, f"{self.stream}/{name}", self.identity, self.step)

    def at(self, step: Tensor | int) -> Draws:
        """The same source at another step."""
        return Draws(self.seed, self.stream, self.identity, step)
