"""A private training that tests may kill, and what is left of it."""

from __future__ import annotations

import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from robust.augment import Augment
from robust.checkpoint import CHECKPOINT
from robust.defenses.privacy import read_ledger, spent, walk  # noqa: F401  loaded before the fork
from robust.defenses.training import get
from robust.fit import FitResult, fit
from robust.privacy import LEDGER, Privacy
from robust.trainer import Progress
from tests.contracts.recipe_subjects import digits

COUNT, BATCH, EPOCHS, BOUND = 60, 12, 6, 0.5
STEPS = EPOCHS * COUNT // BATCH
KILLS = 6


def module() -> nn.Sequential:
    """A small network that draws: it has dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(6)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 10))


def private_fit(out: Path | None = None, **changed: Any) -> FitResult:
    """A training with everything that has state: parts, augmented copies, averages, momentum, a bound that moves."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    asked = {"noise_multiplier": 1.0, "delta": 1e-4, "accountant": "zcdp", "max_grad_norm": BOUND}
    asked |= changed.pop("privacy", {"clipping": "adaptive", "augmentations": 2})
    options: dict[str, Any] = {
        "epochs": EPOCHS, "batch_size": BATCH, "lr": 0.5, "optimizer": "sgd", "ema": 0.9, "accumulate": 2,
        "augment": Augment(crop=1), "checkpoint_seconds": 0.02,
    }  # fmt: skip
    try:
        chosen = {**options, "loss": get("standard")(), **changed}
        model = chosen.pop("model", None) or module()
        return fit(model, digits(COUNT), out=out, privacy=Privacy(**asked), **chosen)
    finally:
        torch.set_num_threads(count)


def booked(folder: Path) -> int:
    """The steps in a run's ledger, 0 where it has none yet."""
    path = folder / LEDGER
    return sum(phase.steps for phase in read_ledger(path)) if path.exists() else 0


def taken(folder: Path) -> int:
    """The steps in a run's checkpoint."""
    return int(load_file(folder / CHECKPOINT)["private/steps"])


def slowly(event: Progress) -> None:
    """Time in which a kill may come."""
    time.sleep(0.004)


def kill_at_random(folder: Path, seed: int) -> list[dict[str, int]]:
    """The training in process after process, each killed by SIGKILL at some moment, `KILLS` times at most.

    Returns:
        After every kill, the steps in ledger and checkpoint.
    """
    importlib.import_module("torch._dynamo")  # as the first optimizer does
    chance, seen = random.Random(seed), list[dict[str, int]]()
    digits(COUNT)
    spent([], delta=1e-4, accountant="zcdp")
    while True:
        process = os.fork()  # this program has done nothing that starts threads
        if not process:
            try:
                private_fit(folder, resume=True, progress=slowly)
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        before, ended = booked(folder), 0
        while not ended and booked(folder) <= before:  # however busy the machine is, some step is begun
            time.sleep(0.01)
            ended, status = os.waitpid(process, os.WNOHANG)
        if not ended:
            time.sleep(chance.uniform(0, 0.1))
            ended, status = os.waitpid(process, 0 if len(seen) == KILLS else os.WNOHANG)
        if ended:
            assert status == 0
            return seen
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        seen.append({"booked": booked(folder), "taken": taken(folder)})


if __name__ == "__main__":  # python -m tests.defenses.private_training_parts FOLDER SEED
    torch.set_num_threads(1)
    print(json.dumps(kill_at_random(Path(sys.argv[1]), int(sys.argv[2]))))
