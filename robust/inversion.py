"""What a gradient inversion sees: the gradient of one training step, as an observer of the training gets it.

An attack takes the observed gradient as a callable, `Observe`, and a `Protocol` that says what an observer knows of how
it came about. `Protocol.observe` makes such a gradient from samples, for measurements; a federation hands in its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.classifier import Classifier
from robust.cuda_ops import clip_accumulate, dequantise, quantise, sparsify
from robust.errors import ConfigError, ModelError, RobustError
from robust.rng import Draws, stream_key

Observe = Callable[[], Sequence[Tensor]]
"""Gives the observed gradient: one tensor for each trained parameter, in the order and shapes of the model's own."""

Weights = Mapping[str, Tensor]
_TINY = 1e-30


class Watched:
    """A model whose weights an observer has, as a function of weights and inputs that can be differentiated twice.

    Batch statistics stay as they are (evaluation mode); use it inside the classifier's `session`.

    Args:
        clf: the model; it is left as it is.
        dtype: what is computed in; weights and buffers are copies of this type.
        trained: names of the trained parameters; None for those that ask for a gradient, or all where none does.
    """

    def __init__(
        self, clf: Classifier, dtype: torch.dtype = torch.float32, trained: Sequence[str] | None = None
    ) -> None:
        self.clf, self.dtype = clf, dtype
        self.names = list(trained) if trained is not None else trained_names(clf)
        if not self.names:
            raise ModelError(f"{clf.name} has no parameters, so that no gradient of them can be observed")
        held = {**dict(clf.module.named_parameters()), **dict(clf.module.named_buffers())}
        copies = {
            name: value.detach().to(dtype) if value.is_floating_point() else value.detach()
            for name, value in held.items()
        }
        self.weights: dict[str, Tensor] = {name: copies[name] for name in self.names}
        self._others = {name: value for name, value in copies.items() if name not in self.weights}
        self._mean, self._std = clf.mean.to(dtype), clf.std.to(dtype)
        self.evaluations = 0  # of the gradient, samples times passes

    def logits(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, classes) of x (N, C, H, W) in the box, under these weights (None: the model's)."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        z = (x - self._mean.view(shape)) / self._std.view(shape)
        held = {**self._others, **(self.weights if weights is None else weights)}
        found: Tensor = torch.func.functional_call(self.clf.module, held, (z,))
        return found

    def gradient(self, x: Tensor, p: Tensor, weights: Weights | None = None) -> dict[str, Tensor]:
        """The gradient of the mean cross-entropy by the weights; p (N, classes) are the labels' probabilities."""
        self.evaluations += len(x)

        def loss(at: Weights) -> Tensor:
            return F.cross_entropy(self.logits(x, at), p)

        found: dict[str, Tensor] = torch.func.grad(loss)(dict(self.weights if weights is None else weights))
        return found

    def flat(self, parts: Weights) -> Tensor:
        """(n,) all parts one after another, in the order of the parameters."""
        return torch.cat([parts[name].flatten() for name in self.names])

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat gradient as one tensor for each parameter."""
        sizes = [self.weights[name].numel() for name in self.names]
        return [
            part.view_as(self.weights[name]) for name, part in zip(self.names, flat.split(sizes), strict=True)
        ]

    def classes(self, x: Tensor) -> int:
        """The number of logits for inputs like x."""
        with torch.no_grad():
            return int(self.logits(x[:1].to(self.dtype)).shape[1])


def trained_names(clf: Classifier) -> list[str]:
    """The parameters that a training changes: those that ask for a gradient, or all where none does."""
    named = [(name, value) for name, value in clf.module.named_parameters() if value.is_floating_point()]
    asked = [name for name, value in named if value.requires_grad]
    return asked or [name for name, _ in named]


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How an observed gradient comes about, as far as an observer knows: all but the samples and the noise drawn.

    Attributes:
        batch: samples in it, over which it is averaged.
        clip: each sample's gradient is scaled down to at most this norm (DP-SGD; Abadi et al. 2016); with several
            local steps the whole update is, as in DP-FedAvg. None clips nothing.
        noise: standard deviation of the Gaussian noise on the sum, as a multiple of `clip`.
        keep: the fraction of entries that is sent, the largest; 1 sends all.
        bits: 8 or 4 quantises what is sent, stochastically, in runs of 1,024 numbers; None sends it as it is.
        steps: local steps on the whole batch. Of several the observer sees the update, divided by -lr · steps, which is
            a mean of gradients.
        lr: of the local steps.
    """

    batch: int = 1
    clip: float | None = None
    noise: float = 0.0
    keep: float = 1.0
    bits: int | None = None
    steps: int = 1
    lr: float = 0.1

    def __post_init__(self) -> None:
        if self.batch < 1 or self.steps < 1 or not 0 < self.lr < math.inf:
            raise ConfigError(
                f"batch={self.batch}, steps={self.steps}, lr={self.lr}: at least 1, at least 1, positive"
            )
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ConfigError(f"clip={self.clip} bounds nothing; give a positive norm such as 1.0")
        if not 0 <= self.noise < math.inf or (self.noise and self.clip is None):
            raise ConfigError(
                f"noise={self.noise} is a multiple of clip={self.clip}; give both, noise at least 0"
            )
        if not 0 < self.keep <= 1 or self.bits not in (None, 4, 8):
            raise ConfigError(
                f"keep={self.keep}, bits={self.bits}: a fraction of at most 1, and 8, 4 or none"
            )

    def expected(self, model: Watched, x: Tensor, p: Tensor) -> Tensor:
        """(n,) the gradient of these samples without noise and compression; it can be differentiated by x and p.

        Args:
            x: (batch, C, H, W) in the box. p: (batch, classes) the labels' probabilities.
        """
        if self.steps > 1:
            return clipped(self._mean_of_steps(model, x, p), self.clip)
        if self.clip is None:
            return model.flat(model.gradient(x, p))
        rows = [model.flat(model.gradient(x[k : k + 1], p[k : k + 1])) for k in range(len(x))]
        return torch.stack([clipped(row, self.clip) for row in rows]).mean(0)

    def observe(self, model: Watched, x: Tensor, y: Tensor, *, seed: int = 0, index: int = 0) -> list[Tensor]:
        """What an observer sees of one step on these samples: clipped, averaged, noised, thinned and rounded.

        Args:
            x: (batch, C, H, W) in the box. y: (batch,) labels.
            seed: with the step's `index` the key of the noise and of the rounding.

        Raises:
            ConfigError: another number of samples than `batch`, in one line.
        """
        if len(x) != self.batch or y.shape != (self.batch,):
            raise ConfigError(
                f"{len(x)} samples, labels {tuple(y.shape)}: a step takes batch={self.batch} of each"
            )
        x = x.to(model.clf.device, model.dtype)
        with model.clf.session():
            p = F.one_hot(y.to(x.device).long(), model.classes(x)).to(x)
        with model.clf.session(), torch.no_grad():
            if self.clip is not None and self.steps == 1:
                rows = [model.flat(model.gradient(x[k : k + 1], p[k : k + 1])) for k in range(len(x))]
                flat = clip_accumulate(torch.stack(rows), None, self.clip)[0] / self.batch
            else:
                flat = self.expected(model, x, p)
            if self.noise:
                assert self.clip is not None
                deviation = self.noise * self.clip / (self.batch if self.steps == 1 else 1)
                place = torch.tensor([index], device=x.device)
                flat = flat + deviation * Draws(seed, "inversion/noise", place).normal(len(flat))[0].to(flat)
            return model.split(self._compressed(flat, seed, index))

    def config(self) -> dict[str, Any]:
        """The settings by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    def _mean_of_steps(self, model: Watched, x: Tensor, p: Tensor) -> Tensor:
        at: Weights = model.weights
        for _ in range(self.steps):
            found = model.gradient(x, p, at)
            at = {name: value - self.lr * found[name] for name, value in at.items()}
        return (model.flat(model.weights) - model.flat(at)) / (self.lr * self.steps)

    def _compressed(self, flat: Tensor, seed: int, index: int) -> Tensor:
        if self.keep < 1:
            count = max(1, round(self.keep * len(flat)))
            threshold = flat.abs().kthvalue(len(flat) - count + 1).values.float()
            flat = sparsify(flat.float(), torch.zeros_like(flat, dtype=torch.float32), threshold)[0].to(flat)
        if self.bits is not None:
            codes, scale = quantise(flat.float(), self.bits, stream_key(seed, "inversion/rounding"), index)
            restored = dequantise(codes, scale, self.bits, flat.shape).to(flat)
            flat = torch.where(flat == 0, flat, restored)
        return flat


def clipped(flat: Tensor, clip: float | None) -> Tensor:
    """A gradient (n,) scaled down to at most the norm `clip`; None leaves it."""
    if clip is None:
        return flat
    shrunk: Tensor = flat * (clip / flat.norm().clamp_min(_TINY)).clamp_max(1.0)
    return shrunk


def watched_gradient(parts: Sequence[Tensor], model: Watched, name: str) -> Tensor:
    """(n,) an observed gradient as the model's own, checked.

    Raises:
        RobustError: parts that do not fit the parameters, that are not finite, or that are all zero, in one line.
    """
    wanted = [tuple(model.weights[key].shape) for key in model.names]
    given = [tuple(part.shape) for part in parts]
    if given != wanted:
        place = next(
            (k for k, pair in enumerate(zip(given, wanted, strict=False)) if pair[0] != pair[1]), None
        )
        where = (
            f"{len(given)} tensors for {len(wanted)} parameters"
            if place is None
            else f"{given[place]} for the parameter {model.names[place]} {wanted[place]}"
        )
        raise RobustError(
            f"{name}: the observed gradient has {where}; give one tensor for each, in their order"
        )
    flat = torch.cat([part.detach().to(model.clf.device, model.dtype).flatten() for part in parts])
    if not bool(flat.isfinite().all()):
        raise RobustError(
            f"{name}: the observed gradient holds NaN or an infinity; nothing can be matched with it"
        )
    if not bool(flat.any()):
        raise RobustError(f"{name}: the observed gradient is zero everywhere; it tells nothing")
    return flat


@dataclass(frozen=True, eq=False)
class Recovery:
    """What an inversion found.

    Attributes:
        x: (N, C, H, W) in the model's box, on the CPU, float32.
        y: (N,) their labels, -1 where the attack tells none.
        objective: of the result, as the attack's own documentation defines it; 0 for a closed form.
        track: (restarts, steps) float32 objective after every step, NaN where a restart took fewer.
        evaluations: gradients of a sample that were computed. stopped: whether a tolerance ended it, not the steps.
    """

    x: Tensor
    y: Tensor
    objective: float
    track: Tensor
    evaluations: int
    stopped: bool = False
