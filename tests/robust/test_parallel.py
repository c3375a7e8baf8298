"""Several processes of one training: the same steps as one process, the same weights in each, one that writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robust.checkpoint import RECORD, WEIGHTS
from robust.parallel import Group
from tests.robust.training_parts import same

ROOT = Path(__file__).resolve().parent.parent.parent


def together(count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A module under torchrun, in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(
        [*command, *arguments],
        env=environment,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=180,
        check=False,
    )


def loaded(path: Path) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
    history, state = torch.load(path)
    return history, state


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear and a normalising network, trained by one process and by two."""
    folder = tmp_path_factory.mktemp("parallel")
    for kind in ("linear", "small"):
        for count in (1, 2):
            out = folder / f"{kind}{count}"
            out.mkdir()
            done = together(count, "-m", "tests.robust.parallel_child", kind, str(out))
            assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_two_processes_take_the_steps_of_one(runs: Path) -> None:
    alone = loaded(runs / "linear1" / "linear-0-of-1.pt")
    shared = loaded(runs / "linear2" / "linear-0-of-2.pt")
    for name, value in alone[1].items():
        torch.testing.assert_close(shared[1][name], value, rtol=1e-5, atol=1e-6)
    for one, other in zip(alone[0], shared[0], strict=True):
        assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "small"])
def test_all_processes_end_with_the_same_bits(runs: Path, kind: str) -> None:
    first, second = (loaded(runs / f"{kind}2" / f"{kind}-{rank}-of-2.pt") for rank in (0, 1))
    assert same(first[1], second[1])
    assert first[0] == second[0]


def test_the_first_process_writes_one_record(runs: Path) -> None:
    record = json.loads((runs / "small2" / "run" / RECORD).read_text())
    assert record["processes"] == 2
    assert (runs / "small2" / "run" / WEIGHTS).is_file()


def test_the_command_line_speaks_once_for_all_processes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = ["--recipe", "pgd-at", "--eps", "0.1", "--set", "steps=1", "--epochs", "1", "--json"]
    done = together(2, "-m", "robust", "train", "--data", "digits", *options, "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    assert found["clean_accuracy"] > 0.15
    assert found["clean_accuracy"] == json.loads((out / RECORD).read_text())["measured"]["clean_accuracy"]


def test_a_recipe_with_a_memory_is_refused_in_one_line(tmp_path: Path) -> None:
    options = ["--recipe", "free", "--eps", "0.1", "--epochs", "1", "--out", str(tmp_path / "run")]
    done = together(2, "-m", "robust", "train", "--data", "digits", *options)
    assert done.returncode != 0
    assert "train it in one process" in done.stderr


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_even_and_whole(size: int) -> None:
    rows = torch.randperm(40)
    shares = [Group(rank, size).share(rows) for rank in range(size)]
    assert sorted(torch.cat(shares).tolist()) == list(range(40))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    few = [Group(rank, size).share(rows[:5]) for rank in range(size)]
    assert sorted(torch.cat(few).tolist()) == sorted(rows[:5].tolist())
    assert all(len(share) != 1 for share in few)
