"""Runs of `evaluate` in a process of their own, which may be killed, die by themselves, or find the disk full."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from itertools import count
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust import Classifier, Linf, Verdict, evaluate
from robust.errors import RobustError
from tests.robust.subjects import Net, network

# One server imports torch once (with what its first gradient imports); every run is a fork of it.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.robust.crash", "robust.attacks", "torch.fx.experimental.symbolic_shapes"]
)
# The steps of a write that Python tells of before it takes them.
STEPS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree")


class Slow(Net):
    """A network that takes its time."""

    seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits, late."""
        if self.seconds:
            time.sleep(self.seconds)
        return super().forward(x)


CALL: dict[str, Any] = {
    "threat": [Linf(0.02), Linf(0.04)],
    "suite": ["fgsm"],
    "chunk": 4,
    "seed": 3,
    "report": False,
}


def subject(seconds: float = 0.0, seed: int = 1) -> tuple[Classifier, Tensor, Tensor]:
    """A model whose forwards take `seconds`, and 12 samples."""
    clf, x, y = network(n=12, seed=seed)
    clf.module.__class__ = Slow
    clf.module.seconds = seconds  # type: ignore[assignment]
    return clf, x, y


def run(out: str | Path | None, seconds: float = 0.0, **options: Any) -> Verdict:
    """The run that all tests interrupt: three chunks, two radii, an attack of one step where no other is wanted."""
    return evaluate(*subject(seconds), out=out, **{**CALL, **options})


def start(out: Path, **options: Any) -> BaseProcess:
    """`_child` in a process of its own."""
    process = _CONTEXT.Process(target=_child, args=(str(out),), kwargs=options)
    process.start()
    return process


def die_everywhere(root: Path, **options: Any) -> int | None:
    """Runs in root/0, root/1, …, each killed before one step more than the last; the first that lives ends it."""
    process = _CONTEXT.Process(target=_breed, args=(str(root),), kwargs=options)
    process.start()
    return end(process)


def _breed(root: str, **options: Any) -> None:
    for number in count():
        child = os.fork()
        if child == 0:
            _child(f"{root}/{number}", die_at=number, **options)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != -signal.SIGKILL:
            os._exit(code)


def end(process: BaseProcess) -> int | None:
    """The exit code."""
    process.join(timeout=300)
    code = process.exitcode
    process.close()
    return code


def _child(
    out: str,
    *,
    die_at: int | None = None,
    largest: int | None = None,
    told: Path | None = None,
    **options: Any,
) -> None:
    """Runs once; exits with 7, and its line in the file `told`, on a `RobustError`.

    Args:
        die_at: the number of the step of `STEPS` below `out` before which to kill itself.
        largest: bytes that a file may have; more is an error of the file system, as on a full disk.
    """
    torch.set_num_threads(1)
    if die_at is not None:
        _die(out, die_at)
    if largest is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
    try:
        run(out, **options)
    except RobustError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        if told is not None:
            told.write_text(str(error))
        os._exit(7)


def _die(out: str, number: int) -> None:
    left = number

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal left
        if event in STEPS and str(args[0]).startswith(out):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(hook)


def facts(out: Path) -> dict[str, Any]:
    """All that a run folder says, without times, and the evidence's bytes."""
    manifest = timeless(json.loads((out / "manifest.json").read_text()))
    for name in ("started", "finished", "command"):
        del manifest[name]
    lines = [timeless(json.loads(line)) for line in (out / "samples.jsonl").read_text().splitlines()]
    return {"manifest": manifest, "lines": lines, "evidence": (out / "adversarial.safetensors").read_bytes()}


def timeless(value: Any) -> Any:
    """JSON without the entries called seconds."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if name != "seconds"}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value
