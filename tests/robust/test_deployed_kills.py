"""`robust eval` against `robust serve`, in processes of their own: either side is killed half-way, and it goes on."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from robust import Verdict
from tests.robust.commands import Command, free_port, serving, stats

N = 24
BATCH = N  # the most points that are asked at once: the clean ones


def evaluation(port: int, out: Path, *more: str) -> list[str]:
    """The command line of the run that is interrupted."""
    subject = ["eval", f"http://127.0.0.1:{port}", "--data", "digits", "--n", str(N), "--eps", "0.2"]
    return [*subject, "--json", "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an unbroken run finds, and what it asks the server."""
    folder, port = tmp_path_factory.mktemp("whole"), free_port()
    with serving(folder / "server", port):
        run = Command(folder / "said", *evaluation(port, folder / "run"))
        assert run.end() == 0, run.said.read_text()
        points = stats(port)["points"]
    verdict = Verdict.load(folder / "run")
    assert run.json()["cost"]["queries"] == verdict.cost["queries"] == points
    assert verdict.suite == "score"
    assert verdict.robust_accuracy < verdict.clean_accuracy
    return {"points": points, "samples": repr(verdict.samples)}


def wait_for(port: int, points: float, run: Command) -> None:
    """Until the server has answered so many."""
    while stats(port)["points"] < points:
        assert run.process.is_alive(), run.said.read_text()
        time.sleep(0.002)


def test_the_client_is_killed_twice_and_every_time_costs_at_most_a_batch(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    port, chance = free_port(), random.Random(5)
    with serving(tmp_path / "server", port):
        for kill in range(2):
            before = stats(port)["points"]
            run = Command(tmp_path / "said", *evaluation(port, tmp_path / "run", "--resume"))
            wait_for(port, before + chance.uniform(0.1, 0.3) * whole["points"], run)
            run.kill()
            assert run.process.exitcode == -signal.SIGKILL
            assert stats(port)["points"] > before, kill
        run = Command(tmp_path / "said", *evaluation(port, tmp_path / "run", "--resume"))
        assert run.end() == 0, run.said.read_text()
        points = stats(port)["points"]
    verdict = Verdict.load(tmp_path / "run")
    assert repr(verdict.samples) == whole["samples"]
    assert whole["points"] <= points <= verdict.cost["queries"] <= whole["points"] + 2 * BATCH
    assert verdict.cost["queries"] - whole["points"] == verdict.manifest["oracle"]["repeated"]


def test_the_server_is_killed_and_comes_back_and_the_client_goes_on_by_itself(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    port = free_port()
    with serving(tmp_path / "server", port) as server:
        run = Command(tmp_path / "said", *evaluation(port, tmp_path / "run"))
        wait_for(port, whole["points"] / 3, run)
        server.kill()
    time.sleep(0.3)
    with serving(tmp_path / "server", port):
        assert run.end() == 0, run.said.read_text()
    verdict = Verdict.load(tmp_path / "run")
    assert repr(verdict.samples) == whole["samples"]
    assert verdict.cost["queries"] <= whole["points"] + BATCH


def test_the_server_is_killed_the_client_gives_up_with_one_line_and_is_resumed(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    port, impatient = free_port(), ("--endpoint", "retries=0")
    with serving(tmp_path / "server", port) as server:
        run = Command(tmp_path / "said", *evaluation(port, tmp_path / "run", *impatient))
        wait_for(port, whole["points"] / 2, run)
        server.kill()
        assert run.end() == 2
    line = run.said.read_text()
    assert line.startswith(f"error: http://127.0.0.1:{port} did not answer at the first try: ")
    assert line.count("\n") == 1
    with serving(tmp_path / "server", port):
        resumed = Command(tmp_path / "said", *evaluation(port, tmp_path / "run", "--resume", *impatient))
        assert resumed.end() == 0, resumed.said.read_text()
    verdict = Verdict.load(tmp_path / "run")
    assert repr(verdict.samples) == whole["samples"]
    assert verdict.cost["queries"] <= whole["points"] + BATCH


def test_serve_ends_cleanly_on_either_signal_and_tells_its_address(tmp_path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        server = Command(tmp_path / "said", "serve", "zoo:digits")
        while "serving" not in (text := server.said.read_text() if server.said.exists() else ""):
            time.sleep(0.02)
        assert text.startswith("serving zoo:digits (scores) at http://127.0.0.1:")
        assert server.process.pid
        os.kill(server.process.pid, number)
        assert server.end() == 0
        assert server.said.read_text().splitlines()[1:] == ["stopped after 0 points in 0 requests"]
        server.said.unlink()


def test_the_secret_of_both_sides_is_written_nowhere(tmp_path: Path) -> None:
    port, secret = free_port(), {"THE_KEY": "Bearer hush-hush-42"}
    with serving(tmp_path / "server", port, "--auth", "THE_KEY", **secret):
        small = ["--n", "6", "--budget", "60", "--endpoint", "auth=THE_KEY"]
        run = Command(tmp_path / "said", *evaluation(port, tmp_path / "run", *small), **secret)
        assert run.end() == 0, run.said.read_text()
        refused = Command(tmp_path / "no", *evaluation(port, tmp_path / "other"))
        assert refused.end() == 2
        assert "refuses with 401" in refused.said.read_text()
    assert not (tmp_path / "other").exists()
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"THE_KEY" in written
    assert b"hush-hush-42" not in written
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["oracle"]["auth"] == "THE_KEY"
