"""Many small models trained at once: shadow models, federated clients, per-class attack models.

Model k has its own rows of one shared data set, its own number of steps and first weights, and its own random streams,
keyed by (seed, key of the model, step). So the weights it ends with do not depend, but for rounding, on the models it
is trained beside, on the engine, or on an interruption.

**Engines.** "vmap" trains the models of a chunk in one pass over stacked parameters, "loop" one model after another, as
many at a time as torch has threads, each on one thread. Measured on a busy core of a CPU (AMD EPYC, torch 2.15), time
per model beside a loop in the same arithmetic: convolutional networks of three layers are 1.3 to 1.5 times slower under
vmap (a convolution over stacked weights becomes a grouped one), and 2.5 times slower than a loop in bfloat16 and
channels-last, which vmap gains nothing from; perceptrons are 2.0 to 2.7 times faster. So "auto" loops on a CPU where
the module convolves, and stacks everywhere else where it can. On a GPU this was not measured.

**Batch normalisation** trains with running statistics of each model's own in both engines (their buffers are stacked).
It would count the rows that pad a ragged batch, so "vmap" takes it only where all batches are whole; "loop" pads
nothing. Modules that draw random numbers (dropout) are for "loop", which seeds every step of every model.
"""

from __future__ import annotations

import copy
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.checkpoint import prepare_folder
from robust.classifier import Classifier
from robust.errors import ConfigError, DataError
from robust.optimise import Settings, make_settings
from robust.recipe import described
from robust.rng import derive
from robust.samples import load_samples
from robust.stacked_engines import (
    Job,
    Loop,
    SampleLoss,
    Stack,
    Stream,
    examine,
    require_finite,
    unstackable,
)
from robust.stacked_shelf import Kept, Shelf
from robust.trainer import Augmentation

if TYPE_CHECKING:
    from robust.data import Data

Engine = Literal["auto", "vmap", "loop"]
ENGINES = ("auto", "vmap", "loop")
First = Mapping[str, Tensor] | Callable[[int], Mapping[str, Tensor]] | None
Progress = Callable[[float, str], None]
CHUNK = 16  # models that are stacked at a time
_UNSUPPORTED = {"ema": None, "compiled": False, "accumulate": 1}


@dataclass(frozen=True)
class Stacked:
    """Models that were trained together.

    Attributes:
        template: the classifier whose architecture, box and normalisation they share.
        states: their state dicts, on the CPU, in the order of the rows that were given.
        losses: their mean training loss in every epoch.
        seconds: what training them took, over all interruptions and threads.
        engine: "vmap" or "loop".
    """

    template: Classifier
    states: Sequence[Mapping[str, Tensor]]
    losses: Sequence[Sequence[float]]
    seconds: float
    engine: str

    def __len__(self) -> int:
        return len(self.states)

    def classifier(self, number: int) -> Classifier:
        """Model `number` as a classifier of its own, in evaluation mode."""
        like = self.template
        module = copy.deepcopy(like.module).eval()
        module.load_state_dict(dict(self.states[number]))
        mean, std = like.mean.flatten().tolist(), like.std.flatten().tolist()
        return Classifier(module, like.bounds, mean, std, like.device, f"{like.name}-{number}")

    def stacked(self) -> dict[str, Tensor]:
        """All states as one: (K, ...) by name."""
        return {name: torch.stack([state[name] for state in self.states]) for name in self.states[0]}


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """The cross-entropy of every sample, (B,)."""
    return F.cross_entropy(logits, y, reduction="none")


def first_states(
    build: Callable[[], Classifier | nn.Module], seed: int
) -> Callable[[int], dict[str, Tensor]]:
    """Keyed first weights, an own draw for every model: for `fit_stacked`'s `first`.

    Args:
        build: makes the model from torch's global generator.
    """

    def first(key: int) -> dict[str, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive(seed, "stacked", key, "init"))
            built = build()
        module = built.module if isinstance(built, Classifier) else built
        return {name: value.detach().clone() for name, value in module.state_dict().items()}

    return first


def fit_stacked(
    model: nn.Module | Classifier,
    data: Data | tuple[Tensor, Tensor],
    rows: Sequence[Tensor],
    *,
    loss: SampleLoss = cross_entropy,
    augment: Augmentation | None = None,
    first: First = None,
    steps: Sequence[int] | None = None,
    keys: Sequence[int] | None = None,
    engine: Engine = "auto",
    chunk: int = CHUNK,
    device: str | torch.device | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    progress: Progress | None = None,
    **walk: object,
) -> Stacked:
    """Train a model for every entry of `rows`; the template itself is left as it is.

    Args:
        model: the template, a module that returns logits or a `Classifier` (which knows box and normalisation).
        data: what the models share: a `Data`, or x (N, ...) in the box or as bytes, and y (N,) labels.
        rows: of every model its samples, (n_k,) numbers of `data`; a row may be in several models.
        loss: ``loss(logits, y)``, the loss (B,) of every sample.
        augment: ``augment(x, identity, seed)``, for example `robust.augment.Augment`; it is keyed by sample, model and
            step.
        first: weights that all models start from (default: the template's), or those of each by its key, such as
            `first_states` gives.
        steps: of every model how many it takes; default: `epochs` passes over its rows.
        keys: of every model its identity in the random streams, at most 2^30; default: its number.
        engine: "vmap", "loop", or "auto", which takes what was measured to be faster, see above.
        chunk: models that are stacked at a time, which bounds the memory that "vmap" takes.
        device: where a bare module is trained; a `Classifier` has its own.
        out: folder that keeps every finished model, and a checkpoint of those in training.
        resume: go on in `out`: finished models are not trained again, and further ones may have been added.
        checkpoint_seconds: time between two checkpoints of a chunk.
        progress: called now and then with the fraction done and a text.
        walk: the fields of `robust.optimise.Settings`: `epochs`, `batch_size`, `lr`, `optimizer`, `schedule`, `seed`,
            `precision`, ...

    Raises:
        ConfigError, DataError: a setting, a row or a label that makes no sense.
        ModelError: the module cannot be stacked, and engine is "vmap".
        RunError: a loss became NaN or infinite, or `out` cannot be written or resumed.
    """
    settings = make_settings(walk)
    clf = model if isinstance(model, Classifier) else Classifier(model, device=device)
    x, y = load_samples(data)
    _check(settings, engine, chunk, rows, len(x), steps, keys)
    job = _job(clf, (x, y), rows, settings, (loss, augment), first, steps, keys)
    chosen = _choose(job, engine)
    shelf = Shelf(None if out is None else prepare_folder(out, True), _identity(job, x, y), resume)
    Run(job, shelf, chosen, 1 if chosen == "loop" else chunk, checkpoint_seconds, progress).train()
    found = [shelf.take(stream) for stream in job.streams]
    return Stacked(
        clf, [kept.state for kept in found], [kept.losses for kept in found], shelf.seconds(), chosen
    )


def _job(
    clf: Classifier,
    samples: tuple[Tensor, Tensor],
    rows: Sequence[Tensor],
    settings: Settings,
    how: tuple[SampleLoss, Augmentation | None],
    first: First,
    steps: Sequence[int] | None,
    keys: Sequence[int] | None,
) -> Job:
    """What `fit_stacked` was told, on the model's device."""
    x, y = (part.to(clf.device) for part in samples)
    names = list(range(len(rows))) if keys is None else [int(key) for key in keys]
    streams = [
        Stream(settings, part.long().to(clf.device), names[k], None if steps is None else int(steps[k]))
        for k, part in enumerate(rows)
    ]
    draws = examine(clf, x[streams[0].rows[:2]], y)
    return Job(clf, x, y, settings, *how, streams, _first(clf, first, names), draws)


def require_supported(settings: Settings) -> None:
    """Raises one line for a setting that only `robust.fit` has."""
    for name, usual in _UNSUPPORTED.items():
        if getattr(settings, name) != usual:
            raise ConfigError(f"{name}={getattr(settings, name)} is for robust.fit; leave it out here")


def _check(
    settings: Settings,
    engine: str,
    chunk: int,
    rows: Sequence[Tensor],
    size: int,
    steps: Sequence[int] | None,
    keys: Sequence[int] | None,
) -> None:
    require_supported(settings)
    if engine not in ENGINES:
        raise ConfigError(f"engine={engine!r} is unknown; use 'auto', 'vmap' or 'loop'")
    if chunk < 1:
        raise ConfigError(f"chunk={chunk} stacks no model; give at least 1")
    if not rows:
        raise DataError("rows is empty; give every model its samples")
    for what, given in (("steps", steps), ("keys", keys)):
        if given is not None and len(given) != len(rows):
            raise ConfigError(f"{what} has {len(given)} entries for {len(rows)} models; give one each")
    if keys is not None and (len(set(keys)) < len(keys) or min(keys) < 0 or max(keys) >= 2**30):
        raise ConfigError("keys must differ from model to model, and lie between 0 and 2^30")
    if steps is not None and min(steps) < 1:
        raise ConfigError(f"steps holds {min(steps)}; every model takes at least 1")
    for k, part in enumerate(rows):
        if part.dim() != 1 or part.is_floating_point() or part.dtype == torch.bool or not len(part):
            raise DataError(
                f"the rows of model {k} are {tuple(part.shape)} of {part.dtype}; give row numbers (n,), 1 or more"
            )
        if int(part.min()) < 0 or int(part.max()) >= size:
            raise DataError(
                f"model {k} has the row {int(part.max())} of {size} samples; rows are 0 to {size - 1}"
            )


def _first(clf: Classifier, first: First, keys: Sequence[int]) -> Callable[[int], Mapping[str, Tensor]]:
    """First weights by the model's number."""
    if callable(first):
        return lambda number: first(keys[number])
    shared = clf.module.state_dict() if first is None else first
    held = {name: value.detach().clone() for name, value in shared.items()}
    return lambda number: held


def _choose(job: Job, engine: Engine) -> str:
    if engine != "auto":
        return engine
    slower = job.clf.device.type == "cpu" and any(
        isinstance(m, nn.modules.conv._ConvNd) for m in job.clf.module.modules()
    )
    return "loop" if slower or unstackable(job, job.streams) is not None else "vmap"


def _identity(job: Job, x: Tensor, y: Tensor) -> dict[str, object]:
    """What two trainings must share for one to continue the other, besides each model's own rows and steps."""
    digest = hashlib.sha256(x.cpu().numpy().tobytes() + y.cpu().numpy().tobytes())
    return {
        **asdict(job.settings),
        "milestones": list(job.settings.milestones),
        "loss": described(job.loss),
        "augment": described(job.augment),
        "data": f"{tuple(x.shape)} sha256:{digest.hexdigest()}",
        "model": type(job.clf.module).__qualname__,
    }


class Run:
    """The training of what is not finished yet: chunk by chunk, on several threads where they train alone."""

    def __init__(
        self, job: Job, shelf: Shelf, engine: str, chunk: int, seconds: float, progress: Progress | None
    ) -> None:
        self.job, self.shelf, self.engine, self.checkpoint_seconds = job, shelf, engine, seconds
        self.progress, self.lock, self.stop = progress, threading.Lock(), threading.Event()
        self.building = threading.Lock()
        left = [k for k, stream in enumerate(job.streams) if not shelf.holds(stream)]
        self.chunks = [left[i : i + chunk] for i in range(0, len(left), chunk)]
        self.total = sum(stream.steps for stream in job.streams)
        self.done = self.total - sum(job.streams[k].steps for k in left)

    def train(self) -> None:
        """Trains all chunks."""
        threads = torch.get_num_threads()
        alone = self.engine == "loop" and self.job.clf.device.type == "cpu" and not self.job.draws
        workers = min(threads, len(self.chunks)) if alone else 1
        if workers < 2:
            devices = [self.job.clf.device] if self.job.clf.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                for numbers in self.chunks:
                    self.chunk(numbers)
            return
        with _one_thread_each(threads), ThreadPoolExecutor(workers) as pool:
            jobs = [pool.submit(self.chunk, numbers, True) for numbers in self.chunks]
            try:
                wait(jobs, return_when=FIRST_EXCEPTION)
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
        for item in jobs:
            if not item.cancelled():
                item.result()

    def chunk(self, numbers: Sequence[int], alone: bool = False) -> None:
        """Trains one chunk from its checkpoint, if any, to the end."""
        if alone:
            torch.set_num_threads(1)
        streams = [self.job.streams[k] for k in numbers]
        with self.building:  # first weights may come from torch's global generator, which all threads share
            team: Loop | Stack = (Loop if self.engine == "loop" else Stack)(self.job, numbers)
        kept = self.shelf.load(streams)
        start, spent = 0, 0.0
        if kept is not None:
            start, spent = kept[0], kept[1]
            team.restore(kept[2])
            self.tell(sum(min(start, stream.steps) for stream in streams), numbers)
        begun = saved = time.monotonic()
        for step in range(start, team.steps):
            if self.stop.is_set():
                return
            team.advance(step)
            now = time.monotonic()
            if now - saved >= self.checkpoint_seconds and step + 1 < team.steps:
                self.shelf.save(streams, step + 1, team.state(), spent + now - begun)
                saved = now
            self.tell(sum(step < stream.steps for stream in streams), numbers)
        seconds = (spent + time.monotonic() - begun) / len(numbers)
        for number, stream, (state, losses) in zip(numbers, streams, team.results(), strict=True):
            require_finite(losses, number, self.job.settings.lr)
            cpu = {name: value.cpu() for name, value in state.items()}
            self.shelf.put(stream, Kept(cpu, losses, seconds))
        self.shelf.drop(streams)

    def tell(self, steps: int, numbers: Sequence[int]) -> None:
        """Notes steps that were taken."""
        with self.lock:
            self.done += steps
            if self.progress is not None:
                last = numbers[-1] + 1
                self.progress(self.done / self.total, f"training model {last} of {len(self.job.streams)}")


@contextmanager
def _one_thread_each(threads: int) -> Iterator[None]:
    """torch's number of threads as it was afterwards: workers set it for themselves, and leave a trace."""
    try:
        yield
    finally:
        torch.set_num_threads(threads)
