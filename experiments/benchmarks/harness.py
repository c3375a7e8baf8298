"""What all benchmarks share: contestants measured in alternation, paired ratios, and a record with its conditions.

Contestants do the same work in the same process on the same number of threads, in turn (ABAB…). The first call of
each stands apart, with everything in it that later calls are spared (tracing, compiling, allocation). A result that
is wrong has no speed: it is refused before anything is written.
"""

from __future__ import annotations

import copy
import gc
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.conditions import conditions as measured_under
from robust.conditions import device_name
from robust.errors import ConfigError, RobustError, first_line
from robust.precision import exact_float32
from robust.registry import unknown
from robust.twin import PRECISIONS, Precision

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"
Say = Callable[[str], None]
Load = Callable[[], tuple[Classifier, Tensor, Tensor]]
Timing = dict[str, Any]


class WrongResult(RobustError):
    """A contestant of ours that does not do the work; the command line exits with 1, as for every failed check."""

    exit_code = 1


@dataclass
class Contestant:
    """One way to do the work.

    Attributes:
        name: as the record and the tables call it.
        call: does all of it once and returns what can be checked; called `repeats` + 1 times.
        ours: whether it is this toolkit's, which must be right.
        check: facts about what a call returned, for the record; raises `WrongResult` where it is wrong.
        cache: its compiler's folder, while it is measured.
    """

    name: str
    call: Callable[[], Any]
    ours: bool = False
    check: Callable[[Any], dict[str, Any]] | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Work:
    """What a benchmark measures.

    Attributes:
        load: gives the classifier and its samples (N, C, H, W), (N,); only benchmarks with a subject call it.
        eps: the linf radius, in the unit of the samples.
        repeats: rounds of the alternation.
        only: the peers wanted; all if empty.
        modes: the precisions of ours; the benchmark's own choice if empty.
        threads: of torch, for every contestant.
        device: where operations without a classifier run.
        say: told what is going on, a line at a time.
    """

    load: Load
    eps: float = 8 / 255
    repeats: int = 3
    seed: int = 0
    only: tuple[str, ...] = ()
    modes: tuple[Precision, ...] = ()
    threads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    say: Say = lambda line: print(line, file=sys.stderr, flush=True)


class Benchmark:
    """The base of all benchmarks: `measure` is what a subclass adds, `record` what people call.

    Attributes:
        name: its registry name.
        peers: names that ``--only`` may list.
        samples: how many it takes by default; 0 where it needs no model and no data.
        rounds: repeats by default.
        eps: the radius by default, as text; None for the usual one of the data.
        modes: the precisions it runs by default.
    """

    name: ClassVar[str] = ""
    peers: ClassVar[tuple[str, ...]] = ()
    samples: ClassVar[int] = 1000
    rounds: ClassVar[int] = 3
    eps: ClassVar[str | None] = "8/255"
    modes: ClassVar[tuple[Precision, ...]] = ("auto", "float32", "bfloat16")

    def prepare(self, load: Load, **wishes: Any) -> Work:
        """The work on what `load` gives, with fields of `Work` by name, checked before anything is loaded."""
        work = Work(load, **wishes)
        self.check(work)
        return work

    def place(self, device: torch.device) -> Path:
        """Where its record belongs by default: results/NAME-DEVICE.json beside this file."""
        label = device_name(device) if device.type == "cuda" else device.type
        return RESULTS / f"{self.name}-{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}.json"

    def measure(self, work: Work) -> dict[str, Any]:
        """The benchmark's own part of the record: "contestants", "ratios", "skipped" and what else it found."""
        raise TypeError(f"{type(self).__name__} measures nothing")

    def check(self, work: Work) -> None:
        """Raises one line for wishes that cannot be met, before anything is loaded."""
        if work.repeats < 1:
            raise ConfigError(f"--repeats: {work.repeats} rounds measure nothing; give at least 1")
        if work.threads < 1:
            raise ConfigError(f"--threads: {work.threads} threads cannot work; give at least 1")
        for name in work.only:
            if name not in self.peers:
                known = ", ".join(self.peers) or "none"
                raise ConfigError(f"--only: {self.name} has no peer {name!r}; its peers are {known}")
        for mode in work.modes:
            if mode not in PRECISIONS:
                raise ConfigError("--precision: " + unknown("precision", mode, list(PRECISIONS)))

    def record(self, work: Work, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Measures, and returns the record: conditions and `settings` first, then what was found.

        Raises:
            ConfigError: a wish that cannot be met.
            WrongResult: ours did not do the work.
        """
        self.check(work)
        before = torch.get_num_threads()
        torch.set_num_threads(work.threads)
        try:
            with exact_float32():
                found = self.measure(work)
        finally:
            torch.set_num_threads(before)
        chosen = {name: getattr(work, name) for name in ("eps", "repeats", "seed", "threads")}
        head = {"schema": SCHEMA, "benchmark": self.name, **conditions(work.device)}
        return {**head, "settings": {**(settings or {}), **chosen}, **found}

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """Column heads and rows of text for one record; by default the contestants' times and ratios."""
        heads = ["", "seconds", "first call", "ratio", "with the first call"]
        return heads, [timing_row(record, name) for name in record["contestants"]]


def timing_row(record: Mapping[str, Any], name: str) -> list[str]:
    """A contestant's median seconds, first call, and its ratios where it has any."""
    timing, ratio = record["contestants"][name], record["ratios"].get(name)
    cells = [name, brief(statistics.median(timing["seconds"])), brief(timing["first_seconds"])]
    if ratio is None:
        return [*cells, timing.get("refused", ""), ""]
    return [*cells, spread(ratio), f"{ratio['included']:.2f}×"]


def brief(seconds: float) -> str:
    """Seconds with three digits, milliseconds at the finest."""
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}"


def spread(ratio: Mapping[str, Any]) -> str:
    """A ratio with its range over the rounds."""
    if len(ratio["pairs"]) == 1:
        return f"{ratio['median']:.2f}×"
    return f"{ratio['median']:.2f}× ({ratio['min']:.2f} to {ratio['max']:.2f})"


# -- measuring --------------------------------------------------------------------------------------------------


def alternate(
    contestants: Sequence[Contestant], repeats: int, device: torch.device, say: Say = lambda line: None
) -> tuple[dict[str, Timing], list[str]]:
    """Runs every contestant once apart, then all in turn, `repeats` times.

    Returns:
        Per name "seconds" and "cpu_seconds" of every repeat, "first_seconds" of the first call, "compile_seconds":
        what that took above the median, and the facts of its check; and the names in the order in which they ran.

    Raises:
        WrongResult: ours failed its check.
    """
    timings: dict[str, Timing] = {}
    order: list[str] = []
    with ExitStack() as stack:
        for one in contestants:
            one.cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="robust-bench-")))
        for one in contestants:
            _forget()
            seconds, cpu, found = timed(one, device)
            facts = one.check(found) if one.check is not None else {}
            timings[one.name] = {"ours": one.ours, "first_seconds": seconds, "seconds": [], "cpu_seconds": []}
            timings[one.name] |= facts
            say(f"{one.name}: first call {seconds:.2f} s")
        for one in contestants:
            if one.cache is not None and any(one.cache.iterdir()):
                timed(one, device)  # forgetting before the next one's first call dropped what it had compiled
        for turn in range(repeats):
            for one in contestants:
                seconds, cpu, _ = timed(one, device)
                order.append(one.name)
                timings[one.name]["seconds"].append(seconds)
                timings[one.name]["cpu_seconds"].append(cpu)
            say(f"round {turn + 1} of {repeats} done")
    for timing in timings.values():
        timing["compile_seconds"] = max(timing["first_seconds"] - statistics.median(timing["seconds"]), 0.0)
    return timings, order


def timed(one: Contestant, device: torch.device) -> tuple[float, float, Any]:
    """Wall seconds, processor seconds and result of one call, the device's queue drained on both sides."""
    with _cache(one.cache), _uncollected():
        _wait(device)
        wall, cpu = time.perf_counter(), time.process_time()
        found = one.call()
        _wait(device)
        return time.perf_counter() - wall, time.process_time() - cpu, found


def ratios(timings: Mapping[str, Timing], pairs: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """How many times faster each contestant of `pairs` is than the one it is compared with.

    Returns:
        Per contestant "against", "pairs" (one ratio a round, both sides of the same round), their "median", "min",
        "max", and "included": the other's median over our first call, which holds all that was spared later.
    """
    found = {}
    for name, against in pairs.items():
        ours, theirs = timings[name], timings[against]
        each = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
        found[name] = {
            "against": against,
            "pairs": each,
            "median": statistics.median(each),
            "min": min(each),
            "max": max(each),
            "included": statistics.median(theirs["seconds"]) / ours["first_seconds"],
        }
    return found


def fastest(timings: Mapping[str, Timing], names: Sequence[str]) -> str | None:
    """The one of `names` with the smallest median, None for no names."""
    return min(names, key=lambda name: statistics.median(timings[name]["seconds"]), default=None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collection while a clock runs: it would meet one contestant and spare the next."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _forget() -> None:
    """Drops compiled code of this process, so that a first call is a first call."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def _cache(folder: Path | None) -> Iterator[None]:
    """The compiler's cache in an empty folder of the contestant's own, so that no earlier run pays for it."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    if folder is not None:
        os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


# -- ours -------------------------------------------------------------------------------------------------------


def fresh(clf: Classifier) -> Classifier:
    """The same classifier without anything it has learnt about itself (a twin, compiled code)."""
    new = Classifier(
        copy.deepcopy(clf.module),
        bounds=clf.bounds,
        mean=clf.mean.flatten().tolist(),
        std=clf.std.flatten().tolist(),
        device=clf.device,
        name=clf.name,
    )
    new.module.eval()
    return new


def allowance(n: int) -> float:
    """How far ours may stay above a peer's robust accuracy: half a point, or two samples of few."""
    return max(0.005, 2 / n)


# -- conditions -------------------------------------------------------------------------------------------------


def conditions(device: torch.device) -> dict[str, Any]:
    """The core's conditions, with the version of every peer that is installed."""
    found = measured_under(device)
    for name in ("triton", "opacus", "torchattacks", "foolbox", "adversarial-robustness-toolbox"):
        try:
            found["versions"][name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def failure(error: BaseException) -> str:
    """An exception as the record keeps it."""
    return f"{type(error).__name__}: {first_line(error)}"
