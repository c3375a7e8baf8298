"""Run folders of trainings: the same bits after `kill -9`, and one line for whatever cannot be continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from robust.checkpoint import CHECKPOINT, RECORD, WEIGHTS
from robust.errors import RunError
from robust.fit import FitResult, fit
from robust.trainer import Progress
from tests.robust.training_parts import blobs, cross_entropy, linear, same, whole_task

ROOT = Path(__file__).resolve().parent.parent.parent


def killed(out: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "tests.robust.training_parts", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=300).returncode
    assert code == -signal.SIGKILL


def test_a_training_killed_twice_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = whole_task(tmp_path / "whole")
    killed(tmp_path / "broken", "9", "step")
    killed(tmp_path / "broken", "4", "write")
    resumed = whole_task(tmp_path / "broken", resume=True)
    assert same(whole.classifier.module.state_dict(), resumed.classifier.module.state_dict())
    assert whole.history == resumed.history
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "broken" / WEIGHTS).read_bytes()
    again = whole_task(tmp_path / "broken", resume=True)  # a finished training has nothing left to do
    assert same(whole.classifier.module.state_dict(), again.classifier.module.state_dict())


def test_the_run_folder_holds_weights_and_their_record(tmp_path: Path) -> None:
    result = fit(
        linear(), blobs(), loss=cross_entropy, epochs=2, out=tmp_path / "a" / "b", record={"why": "test"}
    )
    folder = tmp_path / "a" / "b"
    assert result.out == folder
    assert {path.name for path in folder.iterdir()} == {CHECKPOINT, WEIGHTS, RECORD}
    assert same(load_file(folder / WEIGHTS), result.classifier.module.state_dict())
    record = json.loads((folder / RECORD).read_text())
    assert record == json.loads(json.dumps(result.record))
    assert record["why"] == "test"
    assert record["training"]["seed"] == 0
    assert len(record["history"]) == 2
    assert record["versions"]["torch"] == str(torch.__version__)


def test_another_training_is_not_resumed_and_none_is_overwritten(tmp_path: Path) -> None:
    def train(lr: float, resume: bool, n: int = 50) -> FitResult:
        return fit(linear(), blobs(n), loss=cross_entropy, epochs=1, lr=lr, out=tmp_path, resume=resume)

    train(0.1, resume=True)  # nothing there yet
    with pytest.raises(RunError, match="already holds a training"):
        train(0.1, resume=False)
    with pytest.raises(RunError, match=r"with lr=0\.1, not 0\.2"):
        train(0.2, resume=True)
    with pytest.raises(RunError, match="with data="):
        train(0.1, resume=True, n=40)
    train(0.1, resume=True)


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    fit(linear(), blobs(), loss=cross_entropy, epochs=1, out=tmp_path)
    content = (tmp_path / CHECKPOINT).read_bytes()
    for damaged in (content[:100], content[: len(content) // 2], b""):
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(RunError, match="cannot be resumed from") as caught:
            fit(linear(), blobs(), loss=cross_entropy, epochs=1, out=tmp_path, resume=True)
        assert "\n" not in str(caught.value)


def test_an_out_that_cannot_be_written_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[Progress] = []
    with pytest.raises(RunError, match="cannot be written"):
        fit(
            linear(),
            blobs(),
            loss=cross_entropy,
            epochs=1,
            out=tmp_path / "file" / "run",
            progress=steps.append,
        )
    assert not steps
