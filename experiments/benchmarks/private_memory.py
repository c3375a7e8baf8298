"""Peak memory of a step, private or plain, in a process of its own: ``python -m ...private_memory SUBJECT BATCH PART``.

PART is 0 for a plain step, else the samples that a private step holds at a time. Linux only: it reads /proc.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(subject: str, batch: int, part: int) -> int:
    """Bytes by which the resident memory of a process rises above what it was before its first step, at its highest."""
    module = "robust.experiments.benchmarks.private_memory"
    command = [sys.executable, "-m", module, subject, str(batch), str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _main(subject: str, batch: int, part: int) -> int:
    import torch
    import torch.nn.functional as F

    from robust.defenses.privacy import make_private
    from robust.experiments.benchmarks.private import SUBJECTS

    torch.set_num_threads(1)
    wanted = SUBJECTS[subject]
    model = wanted.make()
    x, y = torch.rand(batch, *wanted.shape), torch.randint(0, 10, (batch,))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), 0.01)
    if part:
        model, optimizer, _ = make_private(
            model, optimizer, None, noise_multiplier=1, expected_batch_size=batch
        )

    def step(rows: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        parts = list(zip(rows.split(part or len(rows)), labels.split(part or len(rows)), strict=True))
        for number, (some, their) in enumerate(parts):
            if part:
                optimizer.expect(number == len(parts) - 1)  # type: ignore[attr-defined]
            F.cross_entropy(model(some), their).backward()
            if part or number == len(parts) - 1:
                optimizer.step()

    step(x[:2], y[:2])  # what libraries set up once
    before = _resident("VmRSS")
    FORGET.write_text("5")
    for _ in range(2):
        step(x, y)
    return _resident("VmHWM") - before


if __name__ == "__main__":
    print(_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
