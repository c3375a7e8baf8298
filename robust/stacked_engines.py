"""How a chunk of small models walks: their keyed batches, and two engines that give the same weights to rounding.

`Loop` trains one model by itself. `Stack` trains all models of its chunk in one pass (`torch.func.functional_call` over
stacked parameters, `vmap` over models); ragged batches are padded, and padded rows weigh nothing.

Both step with the optimizers of `robust.optimise`. In a stack every model has its own learning rate: the updates of
SGD, Adam and AdamW are proportional to it, so the optimizer takes a step of rate 1 from the present weights, of which
each model goes the part that its own rate says; a model that has taken all its steps goes none of it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from robust.checkpoint import below, named
from robust.classifier import Classifier
from robust.errors import DataError, ModelError, RunError, first_line
from robust.optimise import Settings, load_state_tensors, make_optimizer, state_tensors
from robust.rng import derive
from robust.samples import in_box
from robust.trainer import Augmentation

SampleLoss = Callable[[Tensor, Tensor], Tensor]
"""``loss(logits, y)``: of logits (B, classes) and labels (B,) the loss of every sample (B,)."""

_WEIGHT, _BUFFER, _OPTIMIZER, _LOSSES = "weight/", "buffer/", "optimizer/", "losses"


class Stream:
    """The batches and learning rates of one model: a function of (seed, key, step) and its own rows.

    Args:
        settings: of the training.
        rows: (n,) int64, the model's samples among the shared ones.
        key: the model's identity.
        steps: how many it takes; None for `settings.epochs` passes over its rows. The schedule stretches over them.
    """

    def __init__(self, settings: Settings, rows: Tensor, key: int, steps: int | None) -> None:
        size = settings.batch_size
        # A last batch of one sample joins the one before it: batch normalisation cannot be trained on one.
        alone = len(rows) > size and len(rows) % size == 1
        self.settings, self.rows, self.key = settings, rows, key
        self.per_epoch = math.ceil(len(rows) / size) - alone
        self.steps = settings.epochs * self.per_epoch if steps is None else steps
        self.longest = min(len(rows), size) + alone
        self.whole = len(rows) % size == 0 or len(rows) < size
        self._order: tuple[int, Tensor] = (-1, rows)

    def batch(self, step: int) -> Tensor:
        """The samples (b,) of step number `step`."""
        epoch, number = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(
                derive(self.settings.seed, "stacked", self.key, "shuffle", epoch)
            )
            order = torch.randperm(len(self.rows), generator=generator).to(self.rows.device)
            self._order = epoch, self.rows[order]
        start = number * self.settings.batch_size
        last = number == self.per_epoch - 1
        return self._order[1][start : None if last else start + self.settings.batch_size]

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`; 0 after the last one."""
        if step >= self.steps:
            return 0.0
        return self.settings.learning_rate(step, self.steps / self.settings.epochs)


@dataclass(frozen=True)
class Job:
    """What all models of a training share.

    Attributes:
        clf: the template: architecture, box and normalisation. x, y: the shared samples, on its device.
        first: the first weights of model number k. draws: whether a forward in training mode draws random numbers.
    """

    clf: Classifier
    x: Tensor
    y: Tensor
    settings: Settings
    loss: SampleLoss
    augment: Augmentation | None
    streams: Sequence[Stream]
    first: Callable[[int], Mapping[str, Tensor]]
    draws: bool

    def samples(self, rows: Tensor, keys: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Normalised inputs and labels of rows (B,) for the models with the `keys` (B,).

        An augmentation is keyed by (seed, step) and the identity (model, row), so that it is the same in any company.
        """
        x = in_box(self.x[rows])
        if self.augment is not None:
            x = self.augment(x, (keys << 32) + rows, derive(self.settings.seed, "stacked", "augment", step))
        return self.clf.normalise(x), self.y[rows]

    def autocast(self) -> torch.autocast:
        """The arithmetic of a forward."""
        return torch.autocast(
            self.clf.device.type, torch.bfloat16, enabled=self.settings.precision == "bfloat16"
        )


class Loop:
    """One model, trained by itself.

    Args:
        job: what all models share; numbers: the one model's.
    """

    def __init__(self, job: Job, numbers: Sequence[int]) -> None:
        [self.number] = numbers
        self.job, self.stream = job, job.streams[self.number]
        self.steps = self.stream.steps
        self.module = copy.deepcopy(job.clf.module).train()
        self.module.load_state_dict(dict(job.first(self.number)))
        if job.settings.channels_last:
            self.module.to(memory_format=torch.channels_last)
        self.optimizer = make_optimizer(job.settings, self.module)
        self.losses = torch.zeros(_epochs([self.stream]), dtype=torch.float64, device=job.clf.device)

    def advance(self, step: int) -> None:
        """One step."""
        job, stream = self.job, self.stream
        rows = stream.batch(step)
        x, y = job.samples(rows, torch.full_like(rows, stream.key), step)
        if job.draws:
            torch.manual_seed(derive(job.settings.seed, "stacked", stream.key, "step", step))
        for group in self.optimizer.param_groups:
            group["lr"] = stream.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        with job.autocast():
            logits = self.module(x)
        value = job.loss(logits.float(), y).mean()
        value.backward()
        self.optimizer.step()
        self.losses[step // stream.per_epoch] += value.detach().double() * len(rows)

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return {
            **named(_WEIGHT, self.module.state_dict()),
            **named(_OPTIMIZER, state_tensors(self.optimizer)),
            _LOSSES: self.losses,
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        self.module.load_state_dict(below(_WEIGHT, tensors))
        load_state_tensors(self.optimizer, below(_OPTIMIZER, tensors))
        self.losses = tensors[_LOSSES].to(self.losses.device).clone()

    def results(self) -> list[tuple[dict[str, Tensor], list[float]]]:
        """The model's state and its mean loss in every epoch."""
        state = {
            name: value.detach().contiguous().clone() for name, value in self.module.state_dict().items()
        }
        return [(state, _means(self.losses, self.stream))]


class Stack:
    """Several models, trained in one pass.

    Args:
        job: what all models share; numbers: of the models that are stacked.

    Raises:
        ModelError: a module that cannot be stacked, in one line.
    """

    def __init__(self, job: Job, numbers: Sequence[int]) -> None:
        self.job, self.numbers = job, list(numbers)
        self.streams = [job.streams[k] for k in numbers]
        reason = unstackable(job, self.streams)
        if reason is not None:
            raise ModelError(f"{job.clf.name} cannot be stacked: {reason}; use engine='loop'")
        self.steps = max(stream.steps for stream in self.streams)
        self.width = max(stream.longest for stream in self.streams)
        self.skeleton = copy.deepcopy(job.clf.module).train().to("meta")
        firsts = [job.first(k) for k in numbers]
        place = job.clf.device
        unsaved = dict(job.clf.module.named_buffers())

        def stacked(name: str) -> Tensor:
            parts = [first[name] if name in first else unsaved[name] for first in firsts]
            return torch.stack([part.detach() for part in parts]).to(place)

        self.buffers = {name: stacked(name) for name, _ in self.skeleton.named_buffers()}
        self.weights = {
            name: nn.Parameter(stacked(name), requires_grad=p.requires_grad)
            for name, p in self.skeleton.named_parameters()
        }
        self.optimizer = make_optimizer(
            replace(job.settings, lr=1.0), nn.ParameterList(self.weights.values())
        )
        self.keys = torch.tensor([stream.key for stream in self.streams], device=place)
        self.losses = torch.zeros(len(numbers), _epochs(self.streams), dtype=torch.float64, device=place)

    def advance(self, step: int) -> None:
        """One step of every model that has one left."""
        rows, weight = self._batches(step)
        flat = rows.flatten()
        x, y = self.job.samples(flat, self.keys.repeat_interleave(self.width), step)
        x, y = (part.unflatten(0, (len(self.numbers), self.width)) for part in (x, y))
        active = torch.tensor([step < stream.steps for stream in self.streams], device=rows.device)
        kept = {} if bool(active.all()) else {name: value.clone() for name, value in self.buffers.items()}
        self.optimizer.zero_grad(set_to_none=True)
        try:
            values = vmap(self._loss, randomness="error")(self.weights, self.buffers, x, y, weight)
        except torch.OutOfMemoryError:
            raise RunError(
                f"{len(self.numbers)} models at a time take more memory than there is; lower chunk"
            ) from None
        except RuntimeError as error:
            raise ModelError(
                f"{self.job.clf.name} cannot be stacked ({first_line(error)}); use engine='loop'"
            ) from error
        values.sum().backward()
        self._descend([stream.rate(step) for stream in self.streams])
        for name, before in kept.items():
            still = active.view(-1, *[1] * (before.dim() - 1))
            self.buffers[name] = torch.where(still, self.buffers[name], before)
        counts = (weight > 0).sum(1)
        epochs = torch.tensor(
            [min(step // s.per_epoch, self.losses.shape[1] - 1) for s in self.streams], device=rows.device
        )
        told = torch.where(active, values.detach().double() * counts, 0.0)
        self.losses.scatter_add_(1, epochs[:, None], told[:, None])

    def _batches(self, step: int) -> tuple[Tensor, Tensor]:
        """Rows (K, width), padded with each batch's own first row, and weights that are 0 for padding."""
        rows = torch.empty(len(self.numbers), self.width, dtype=torch.int64, device=self.job.x.device)
        weight = torch.zeros(rows.shape, device=rows.device)
        for i, stream in enumerate(self.streams):
            if step >= stream.steps:
                rows[i] = stream.rows[0]
                continue
            batch = stream.batch(step)
            rows[i], rows[i, : len(batch)] = batch[0], batch
            weight[i, : len(batch)] = 1 / len(batch)
        return rows, weight

    def _loss(
        self,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        x: Tensor,
        y: Tensor,
        weight: Tensor,
    ) -> Tensor:
        with self.job.autocast():
            logits = functional_call(self.skeleton, {**weights, **buffers}, (x,))
        return (self.job.loss(logits.float(), y) * weight).sum()

    def _descend(self, rates: Sequence[float]) -> None:
        """A step of the optimizer, of the length that each model's learning rate says."""
        alike = len(set(rates)) == 1
        for group in self.optimizer.param_groups:
            group["lr"] = rates[0] if alike else 1.0
        moving = [p for p in self.weights.values() if p.requires_grad]
        before = [] if alike else [p.detach().clone() for p in moving]
        self.optimizer.step()
        share = torch.tensor(rates, device=self.keys.device)
        with torch.no_grad():
            for p, old in zip(moving, before, strict=False):
                p.copy_(old + share.view(-1, *[1] * (p.dim() - 1)).to(p) * (p - old))

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return {
            **named(_WEIGHT, {name: p.detach() for name, p in self.weights.items()}),
            **named(_BUFFER, self.buffers),
            **named(_OPTIMIZER, state_tensors(self.optimizer)),
            _LOSSES: self.losses,
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        for prefix, own in ((_WEIGHT, self.weights), (_BUFFER, self.buffers)):
            with torch.no_grad():
                for name, value in below(prefix, tensors).items():
                    own[name].copy_(value)
        load_state_tensors(self.optimizer, below(_OPTIMIZER, tensors))
        self.losses = tensors[_LOSSES].to(self.losses.device).clone()

    def results(self) -> list[tuple[dict[str, Tensor], list[float]]]:
        """Every model's state and its mean loss in every epoch."""
        held = set(self.job.clf.module.state_dict())
        whole = {name: v.detach() for name, v in {**self.weights, **self.buffers}.items() if name in held}
        return [
            ({name: value[i].clone() for name, value in whole.items()}, _means(self.losses[i].cpu(), stream))
            for i, stream in enumerate(self.streams)
        ]


def unstackable(job: Job, streams: Sequence[Stream]) -> str | None:
    """Why models cannot be trained in one pass; None where they can."""
    if job.draws:
        return "it draws random numbers in training (dropout), and every model must draw its own"
    held = dict(job.clf.module.named_parameters()) | dict(job.clf.module.named_buffers())
    if not set(job.clf.module.state_dict()) <= set(held):
        return "two of its layers share a weight"
    normalised = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in job.clf.module.modules())
    ragged = len({s.longest for s in streams}) > 1 or not all(s.whole for s in streams)
    if normalised and ragged:
        return (
            "batch normalisation would count the rows that pad ragged batches; give all models as many rows, in whole "
            "batches"
        )
    return None


def examine(clf: Classifier, x: Tensor, y: Tensor) -> bool:
    """Whether a forward of the module in training mode draws from torch's generators.

    Args:
        x: (2 or more, ...) in the box, or bytes. y: (N,) all labels.

    Raises:
        ModelError, DataError: the module does not take such inputs, or has no output for a label, in one line.
    """
    module = copy.deepcopy(clf.module).train()
    devices = [clf.device] if clf.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        before = _generators(clf.device)
        try:
            logits = module(clf.normalise(in_box(x)))
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ModelError(
                f"{clf.name} fails on inputs of shape {tuple(x.shape)}: {first_line(error)}"
            ) from error
        after = _generators(clf.device)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ModelError(f"{clf.name} returns no logits (N, classes); stacked training needs a classifier")
    if int(y.max()) >= logits.shape[1]:
        raise DataError(f"a label is {int(y.max())}, but {clf.name} has {logits.shape[1]} classes")
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _generators(device: torch.device) -> list[Tensor]:
    own = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *own]


def require_finite(losses: Sequence[float], number: int, lr: float) -> None:
    """Raises `RunError` where a model's training has run away."""
    if not all(map(math.isfinite, losses)):
        raise RunError(
            f"the loss of model {number} became NaN or infinite; lower the learning rate (lr={lr:g})"
        )


def _epochs(streams: Sequence[Stream]) -> int:
    return max(max(math.ceil(s.steps / s.per_epoch), 1) for s in streams)


def _means(sums: Tensor, stream: Stream) -> list[float]:
    """Mean losses from sums over the samples of every epoch; of the last one over the steps that were taken."""
    epochs, rest = divmod(stream.steps, stream.per_epoch)
    counts = [len(stream.rows)] * epochs
    if rest:
        counts.append(min(rest * stream.settings.batch_size, len(stream.rows)))
    return [float(total) / count for total, count in zip(sums.tolist(), counts, strict=False)]
