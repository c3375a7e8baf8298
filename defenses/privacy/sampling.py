"""Batches of private training: Poisson samples, and large batches in physical parts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from robust.defenses.privacy.noise import Noise
from robust.errors import ConfigError


class PrivateLoader:
    """A data loader whose batches are Poisson samples, or another loader's, in parts of bounded size.

    Every sample is in a batch with probability at most `sample_rate`, independently of all others and of all other
    steps; so batches have any size, 0 too: an empty one has tensors of length 0, and its step is noise alone. A batch
    of more than `max_physical_batch_size` samples comes in parts, and the optimizer steps after the last of them.

    Attributes:
        sample_rate: the probability; None where the batches are the other loader's.
        step: logical batches that were given out in full, over all epochs. The loader goes on from here.

    Args:
        loader: a map-style data set with its collation and workers.
        noise: where Poisson samples are drawn from; None for the other loader's batches.
        max_physical_batch_size: samples in memory at a time; None for all of a batch.
        notify: told before each part whether it is the last one of its batch.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        noise: Noise | None,
        max_physical_batch_size: int | None = None,
        notify: Callable[[bool], None] = lambda last: None,
    ) -> None:
        try:
            self.size, self.steps = len(loader.dataset), len(loader)  # type: ignore[arg-type]
        except TypeError:
            raise ConfigError(
                "an iterable data set cannot be sampled; give one with a length and items"
            ) from None
        if self.size == 0 or self.steps == 0 or loader.batch_sampler is None:
            raise ConfigError("the loader has no batches; give it a data set and a batch_size")
        self.loader, self.noise, self.notify = loader, noise, notify
        self.most = max_physical_batch_size
        if self.most is not None and self.most < 1:
            raise ConfigError(f"max_physical_batch_size={self.most}: 1 or more is wanted")
        self.sample_rate = None if noise is None else 1 / self.steps
        self.step = 0
        self._empty: Any = None

    def __len__(self) -> int:
        """Logical batches of an epoch."""
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        """The parts of the batches up to the end of the epoch, from where `step` is."""
        ends: deque[bool] = deque()
        inner = self.loader
        parts = DataLoader(
            inner.dataset,
            batch_sampler=_Parts(self._batches(), self.most, ends),
            num_workers=inner.num_workers,
            collate_fn=self._collate,
            pin_memory=inner.pin_memory,
            timeout=inner.timeout,
            worker_init_fn=inner.worker_init_fn,
            multiprocessing_context=inner.multiprocessing_context,
            prefetch_factor=inner.prefetch_factor,
        )
        for part in parts:
            last = ends.popleft()
            self.notify(last)
            self.step += last
            yield part

    def state_dict(self) -> dict[str, int]:
        """Where the loader stands."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there."""
        self.step = int(state["step"])

    def _batches(self) -> Iterator[list[int]]:
        if self.noise is None or self.sample_rate is None:
            assert self.loader.batch_sampler is not None
            yield from (list(batch) for batch in self.loader.batch_sampler)
            return
        first = self.step
        for step in range(first, (first // self.steps + 1) * self.steps):
            yield self.noise.chosen(self.size, self.sample_rate, step).tolist()

    def _collate(self, samples: list[Any]) -> Any:
        collate: Any = self.loader.collate_fn
        if samples:
            return collate(samples)
        if self._empty is None:
            self._empty = tree_map(_nothing, collate([self.loader.dataset[0]]))
        return self._empty


class _Parts:
    """Batches in parts, for a loader's workers; `ends` says of each part whether it is a batch's last."""

    def __init__(self, batches: Iterator[list[int]], most: int | None, ends: deque[bool]) -> None:
        self.batches, self.most, self.ends = batches, most, ends

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            size = self.most or max(len(batch), 1)
            starts = range(0, max(len(batch), 1), size)
            for start in starts:
                self.ends.append(start == starts[-1])
                yield batch[start : start + size]


def _nothing(value: Any) -> Any:
    return torch.empty_like(value[:0]) if isinstance(value, Tensor) and value.ndim else value
