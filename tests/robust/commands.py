"""`robust` commands in processes of their own, which can be killed."""

from __future__ import annotations

import json
import os
import socket
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from tests.robust.crash import _CONTEXT

# As in crash, and what these commands import besides.
_CONTEXT.set_forkserver_preload(
    [
        *("tests.robust.commands", "robust.attacks", "robust.attacks.blackbox.square", "robust.models.http"),
        *(
            "robust.cli.eval",
            "robust.cli.serve",
            "robust.report",
            "jinja2",
            "sklearn.datasets",
            "scipy.special",
        ),
        "torch.fx.experimental.symbolic_shapes",
    ]
)


class Command:
    """One command under way.

    Args:
        said: a file that takes what it prints; arguments: its command line; environment: variables it gets.
    """

    def __init__(self, said: Path, *arguments: str, **environment: str) -> None:
        self.said = said
        self.process: BaseProcess = _CONTEXT.Process(target=_run, args=(str(said), arguments, environment))
        self.process.start()

    def end(self) -> int | None:
        """Its exit code, once it ends."""
        self.process.join(timeout=120)
        return self.process.exitcode

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.join()

    def json(self) -> dict[str, Any]:
        """The object that it printed last."""
        found: dict[str, Any] = json.loads(self.said.read_text().splitlines()[-1])
        return found


def _run(said: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    from robust.cli.main import run

    torch.set_num_threads(1)
    os.environ.update(environment)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    raise SystemExit(run(arguments))


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port


@contextmanager
def serving(said: Path, port: int, *more: str, **environment: str) -> Iterator[Command]:
    """`robust serve zoo:digits` in a process of its own, once it answers."""
    server = Command(said, "serve", "zoo:digits", "--port", str(port), *more, **environment)
    try:
        for _ in range(1000):
            assert server.process.is_alive(), said.read_text()
            if said.exists() and "serving" in said.read_text():
                break
            time.sleep(0.02)
        yield server
    finally:
        server.kill()


def stats(port: int) -> dict[str, int]:
    """What a server has answered; nothing where there is none."""
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=10) as answer:
        found: dict[str, int] = json.load(answer)
        return found
    return {"points": 0}
