"""What the engine adds to bare model calls, and whether its work and memory stay flat as the data grow."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robust
from robust.attacks.base import Result
from robust.attacks.whitebox.pgd import PGD
from robust.classifier import Classifier
from robust.errors import first_line
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    alternate,
    fresh,
    ratios,
    timing_row,
)
from robust.threat import Linf
from robust.twin import Precision, Twin

STEPS = 20
SIZES = (100, 1_000, 10_000)
FEW = 50  # divides them, so that each of the repeated samples counts alike


@dataclass(frozen=True)
class Engine(Benchmark):
    """The engine's overhead over bare forwards and gradients, and model passes and memory as the data grow.

    Attributes:
        sizes: numbers of samples at which passes and memory are measured, each in a process of its own.
    """

    name: ClassVar[str] = "engine"
    samples: ClassVar[int] = 64
    modes: ClassVar[tuple[Precision, ...]] = ("original", "float32", "bfloat16")
    sizes: tuple[int, ...] = SIZES

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        clf, x, y = work.load()
        x, y = x.to(clf.device), y.to(clf.device)
        clf.check(x)
        modes = work.modes or self.modes
        batch = batch_of(fresh(clf), x, y, work.eps)
        x, y = x[: len(x) // batch * batch], y[: len(y) // batch * batch]
        entries: list[Contestant] = []
        pairs: dict[str, str] = {}
        calls: dict[str, Any] = {}
        for mode in modes:
            own = fresh(clf)
            own.check(x)
            result = _pgd(own, x, y, work, mode)  # makes the twin that the bare calls use, too
            forwards, gradients = _calls(result, batch)
            subject = _asked(own, mode)
            engine = _engine(own, x, y, work, mode)
            calls[mode] = {"forwards": forwards, "gradients": gradients, "batch": batch}
            bare = _bare(f"bare calls, {mode}", subject, x, y, batch, forwards, gradients)
            steps = _bare(f"bare gradients, {mode}", subject, x, y, batch, 0, gradients)
            entries += [engine, bare, steps]
            pairs |= {bare.name: engine.name, steps.name: engine.name}
        timings, order = alternate(entries, work.repeats, clf.device, work.say)
        return {
            "model": {"name": clf.name, "digest": clf.digest(), "n": len(x), "shape": list(x.shape[1:])},
            "contestants": timings,
            "order": order,
            "ratios": ratios(timings, pairs),
            "calls": calls,
            "scaling": self._scaling(work, clf, x, y),
            "skipped": {},
        }

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        rows = [timing_row(record, name)[:4] for name in record["contestants"]]
        for size, found in record["scaling"].items():
            said = found.get("failed") or (
                f"{found['passes_per_image']:.2f} passes an image, "
                f"{found['peak_bytes'] / 2**20:.0f} MiB above the start"
            )
            rows.append([f"{int(size):,} samples", "", "", said])
        return ["engine", "seconds", "first call", "the engine's time in this one's"], rows

    def _scaling(self, work: Work, clf: Classifier, x: Tensor, y: Tensor) -> dict[str, Any]:
        """Per size what its own process said."""
        found = {}
        with tempfile.TemporaryDirectory(prefix="robust-bench-") as folder:
            path = Path(folder) / "subject.pt"
            try:
                torch.save({"clf": fresh(clf), "x": x[:FEW].cpu(), "y": y[:FEW].cpu(), "eps": work.eps}, path)
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                return {str(size): {"failed": first_line(error)} for size in self.sizes}
            for size in self.sizes:
                found[str(size)] = _child(path, size, work)
                work.say(f"{size:,} samples done")
        return found


def batch_of(clf: Classifier, x: Tensor, y: Tensor, eps: float) -> int:
    """The batch size in which the engine asks for most gradients of `clf` on x (N, C, H, W)."""
    seen: Counter[int] = Counter()

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].requires_grad:
            seen[len(inputs[0])] += len(inputs[0])

    handle = clf.module.register_forward_pre_hook(count)
    try:
        PGD(threat=Linf(eps), steps=2).run(clf, x, y, precision="original")
    finally:
        handle.remove()
    return min(seen.most_common(1)[0][0], len(x))


def _calls(result: Result, batch: int) -> tuple[int, int]:
    """Batches forward only and batches with a gradient that the engine asked for."""
    cost = result.cost
    return round((cost.forwards - cost.backwards) / batch), round(cost.backwards / batch)


def _asked(clf: Classifier, mode: Precision) -> Classifier | Twin:
    """What answered the engine: the twin of that arithmetic, or the classifier where there is none."""
    dtype = {"float32": "torch.float32", "bfloat16": "torch.bfloat16"}.get(mode, "")
    kept = clf.twins.get(dtype)
    return clf if kept is None or kept[1] is None else kept[1]


def _pgd(clf: Classifier, x: Tensor, y: Tensor, work: Work, mode: Precision) -> Result:
    return PGD(threat=Linf(work.eps), steps=STEPS).run(clf, x, y, seed=work.seed, precision=mode)


def _engine(clf: Classifier, x: Tensor, y: Tensor, work: Work, mode: Precision) -> Contestant:
    def check(result: Result) -> dict[str, Any]:
        if bool((~Linf(work.eps).inside(result.x_adv, x, clf.bounds)).any()):
            raise WrongResult("points of our PGD lie outside the ball")
        if result.cost.backwards < STEPS * len(x):
            raise WrongResult(f"{result.cost.backwards} gradients for {len(x)} samples and {STEPS} steps")
        return {"forwards": result.cost.forwards, "backwards": result.cost.backwards}

    return Contestant(f"pgd, {mode}", lambda: _pgd(clf, x, y, work, mode), ours=True, check=check)


def _bare(
    name: str, subject: Classifier | Twin, x: Tensor, y: Tensor, batch: int, forwards: int, gradients: int
) -> Contestant:
    """So many model calls and nothing else, on the same batches."""
    parts = list(zip(x.split(batch), y.split(batch), strict=True))

    def call() -> None:
        with _session(subject):
            for i in range(gradients):
                some, labels = parts[i % len(parts)]
                point = some.detach().requires_grad_(True)
                loss = F.cross_entropy(subject(point), labels, reduction="sum")
                torch.autograd.grad(loss, point)
            for i in range(forwards):
                subject.logits(parts[i % len(parts)][0])

    return Contestant(name, call)


@contextmanager
def _session(subject: Classifier | Twin) -> Iterator[None]:
    """One session for all calls: the engine pays for it once, too."""
    with (subject if isinstance(subject, Classifier) else subject.original).session():
        yield


# -- a process of its own ---------------------------------------------------------------------------------------


def _child(path: Path, size: int, work: Work) -> dict[str, Any]:
    """What `scaling` found in a process of its own, or the last line of its complaint."""
    home = str(Path(robust.__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH")
    environment = {**os.environ, "PYTHONPATH": home if not known else f"{home}{os.pathsep}{known}"}
    command = [sys.executable, "-m", "robust.experiments.benchmarks.scaling"]
    command += [str(path), str(size), str(work.threads), str(work.seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["it failed in silence"])[-1]}
    found: dict[str, Any] = torch.load(path.with_name(f"{size}.pt"), weights_only=True)
    return found
