"""Model passes an image and peak memory of a verdict on so many samples: ``python -m … SUBJECT N THREADS SEED``.

A process of its own, because the peak of a process never falls. Its answer is the file N.pt beside SUBJECT.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.evaluate import evaluate
from robust.threat import Linf
from robust.twin import Precision


class Repeated:
    """So many samples that repeat a few, read one at a time, as data from a disk are.

    Args:
        x: (M, C, H, W); y: (M,); size: N.
    """

    def __init__(self, x: Tensor, y: Tensor, size: int) -> None:
        self.x, self.y, self.size = x, y, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        """Sample i: (C, H, W) and its label."""
        if not 0 <= i < self.size:
            raise IndexError(i)
        return self.x[i % len(self.x)], int(self.y[i % len(self.y)])


def peak_bytes(device: torch.device) -> int:
    """The most memory that the process (on a GPU: its tensors) has held, since `reset_peak` where that works."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource  # absent on Windows

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak(device: torch.device) -> None:
    """Begins to measure the peak anew, so that what imports held for a moment hides nothing."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def measure(
    subject: dict[str, Any], size: int, seed: int, precision: Precision = "float32"
) -> dict[str, float]:
    """Passes and memory of a verdict by BIM, which draws nothing, so that repeated samples cost alike.

    Args:
        subject: "clf", "x" (M, C, H, W), "y" (M,) and "eps".
    """
    clf, threat = subject["clf"], Linf(subject["eps"])

    def run(count: int) -> dict[str, float]:
        data = Repeated(subject["x"], subject["y"], count)
        with tempfile.TemporaryDirectory(prefix="robust-bench-") as folder:
            verdict = evaluate(
                clf,
                data,
                threat=threat,
                suite="bim",
                seed=seed,
                precision=precision,
                out=Path(folder) / "run",
                report=False,
            )
        return verdict.cost

    run(len(subject["x"]))
    reset_peak(clf.device)
    before = peak_bytes(clf.device)
    cost = run(size)
    return {
        "passes_per_image": (cost["forwards"] + cost["backwards"]) / size,
        "start_bytes": before,
        "peak_bytes": peak_bytes(clf.device) - before,
        "seconds": cost["seconds"],
    }


def main(arguments: list[str]) -> int:
    """The command line."""
    path, size, threads, seed = Path(arguments[0]), *map(int, arguments[1:])
    torch.set_num_threads(threads)
    # The parent has just written this file in a folder of its own.
    subject = torch.load(path, weights_only=False)
    torch.save(measure(subject, size, seed), path.with_name(f"{size}.pt"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
