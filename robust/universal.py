"""What a universal change does to images that it was not learnt from: rates with intervals, on any model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.decide import decide
from robust.rows import Source, as_source

Apply = Callable[[Tensor, Tensor], Tensor]  # (images, their index) -> changed images
ApplyAt = Callable[[Tensor, Tensor, float, float], Tensor]  # (images, their index, angle, scale)
CHUNK = 256  # images held at once


@dataclass(frozen=True)
class Outcome:
    """What became of N images.

    Attributes:
        y: (N,) true classes. clean, changed: (N,) predictions without and with the change; -1 for NaN.
        target: the class that was to be reached; None where any wrong one counts.
    """

    y: Tensor
    clean: Tensor
    changed: Tensor
    target: int | None = None

    @property
    def attempted(self) -> Tensor:
        """(N,) bool: classified correctly without the change, and not of the target class."""
        right = self.clean == self.y
        return right if self.target is None else right & (self.y != self.target)

    @property
    def fooled(self) -> Tensor:
        """(N,) bool: attempted images whose answer is wrong now, or the target."""
        hit = self.changed != self.y if self.target is None else self.changed == self.target
        return hit & self.attempted

    @property
    def rate(self) -> float | None:
        """The share of attempted images that are fooled; None where none was attempted."""
        total = int(self.attempted.sum())
        return int(self.fooled.sum()) / total if total else None

    def summary(self) -> dict[str, Any]:
        """Rate, its 95 % interval, counts and accuracies for JSON."""
        from robust.report import clopper_pearson

        fooled, attempted = int(self.fooled.sum()), int(self.attempted.sum())
        low, high = clopper_pearson(fooled, attempted)
        accuracy = [float((part == self.y).double().mean()) for part in (self.clean, self.changed)]
        return {
            "success_rate": self.rate,
            "interval": [low, high],
            "fooled": fooled,
            "attempted": attempted,
            "n": len(self.y),
            "clean_accuracy": accuracy[0],
            "robust_accuracy": accuracy[1],
        }


def outcome(
    model: Classifier,
    data: Any,
    apply: Apply,
    *,
    target: int | None = None,
    seed: int = 0,
    clean: Tensor | None = None,
    progress: Callable[[float], None] | None = None,
) -> Outcome:
    """Asks the model, in float32, about every image without and with a change.

    Args:
        data: indexable pairs (x, y), such as a `Data`, or a tuple of tensors x (N, C, H, W) and y (N,).
        apply: what changes images; it is also given their places in the data, which key its randomness.
        target: the class that counts as success; None for every wrong one.
        seed: keys a randomised model's draws.
        clean: (N,) the model's clean predictions, where they are known.
    """
    source = as_source(*data) if isinstance(data, tuple) else as_source(data)
    labels, before, after = [], [], []
    for rows in chunks(len(source)):
        x, y = source.batch(rows)
        index = torch.tensor(rows)
        labels.append(y.cpu())
        if clean is None:
            before.append(decide(model, x, y, index=index, seed=seed).prediction.cpu())
        after.append(decide(model, apply(x, index), y, index=index, seed=seed).prediction.cpu())
        if progress is not None:
            progress((rows[-1] + 1) / len(source))
    return Outcome(torch.cat(labels), torch.cat(before) if clean is None else clean, torch.cat(after), target)


def chunks(count: int) -> Iterator[list[int]]:
    """The rows 0…count−1, a chunk at a time."""
    for start in range(0, count, CHUNK):
        yield list(range(start, min(start + CHUNK, count)))


@dataclass(frozen=True)
class Grid:
    """A patch's success at every combination of an angle and a scale, each at random places.

    Attributes:
        angles: in degrees. scales: against the patch's own size. n: attempted images behind every rate.
        rates: one row per scale, one column per angle, shares in [0, 1].
    """

    angles: tuple[float, ...]
    scales: tuple[float, ...]
    rates: tuple[tuple[float, ...], ...]
    n: int


def success_grid(
    model: Classifier,
    data: Any,
    apply: ApplyAt,
    axes: tuple[Sequence[float], Sequence[float]],
    outcomes: Outcome,
    *,
    most: int = 200,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Grid:
    """A patch's success over scale and angle, on the first `most` images that it was tried on.

    Args:
        data: as in `outcome`. outcomes: what `outcome` said about it, which tells which images count.
        apply: places the patch in images, given their index, an angle and a scale.
        axes: angles and scales.
    """
    source: Source = as_source(*data) if isinstance(data, tuple) else as_source(data)
    rows = outcomes.attempted.nonzero()[:, 0][:most].tolist()
    angles, scales = tuple(axes[0]), tuple(axes[1])
    if not rows:
        return Grid(angles, scales, tuple(tuple(0.0 for _ in angles) for _ in scales), 0)
    x, y = source.batch(rows)
    index = torch.tensor(rows)
    rates = []
    for k, (scale, angle) in enumerate(itertools.product(scales, angles)):
        answer = decide(model, apply(x, index, angle, scale), y, index=index, seed=seed).prediction.cpu()
        hit = answer != y.cpu() if outcomes.target is None else answer == outcomes.target
        rates.append(float(hit.double().mean()))
        if progress is not None:
            progress((k + 1) / (len(scales) * len(angles)))
    width = len(angles)
    table = tuple(tuple(rates[k : k + width]) for k in range(0, len(rates), width))
    return Grid(angles, scales, table, len(rows))
