"""What the tests of the training loop share: data, networks, and a training that kills itself."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.augment import Augment
from robust.classifier import Classifier
from robust.fit import FitResult, fit
from robust.trainer import Progress


def cross_entropy(clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
    """The plainest loss."""
    return F.cross_entropy(clf(x), y)


def blobs(n: int = 50) -> tuple[Tensor, Tensor]:
    """Two classes of 6x6 images, bright above or bright below."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(n) % 2
    x = torch.rand(n, 1, 6, 6, generator=generator) * 0.6
    x[:, :, :3] += 0.4 * (y == 0).float().view(-1, 1, 1, 1)
    x[:, :, 3:] += 0.4 * (y == 1).float().view(-1, 1, 1, 1)
    return x, y


def small() -> nn.Sequential:
    """A network with everything that has state or draws: batch norm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 2)
        )


def linear() -> nn.Sequential:
    """The smallest network."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 2))


def whole_task(out: Path | None, kill_at: int | None = None, resume: bool = False) -> FitResult:
    """A training that uses every kind of state; it kills itself with SIGKILL after step `kill_at`."""

    def watch(event: Progress) -> None:
        if event.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fit(
            small(), blobs(), loss=cross_entropy, epochs=3, batch_size=8, lr=1e-2, optimizer="adamw", warmup=1,
            weight_decay=1e-2, ema=0.9, seed=5, augment=Augment(crop=1, flip=True), valid=blobs(20),
            keep="valid_accuracy", accumulate=2, precision="bfloat16", out=out, resume=resume,
            checkpoint_seconds=0, progress=watch,
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def die_while_writing(count: int) -> None:
    """SIGKILL in the middle of the write number `count`: the temporary file is there, but was not renamed."""
    left = [count]

    def replace(self: Path, target: Path) -> Path:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace(self, target)
        return target

    Path.replace = replace  # type: ignore[method-assign, assignment]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two states are equal to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":  # python -m tests.robust.training_parts FOLDER COUNT step|write
    if sys.argv[3] == "write":
        die_while_writing(int(sys.argv[2]))
    whole_task(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[3] == "step" else None, resume=True)
