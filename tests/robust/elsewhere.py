"""Models elsewhere: one in this process that counts and dies, and servers over real sockets that fail on demand."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from robust import Classifier, Oracle
from robust.oracle import Remote
from robust.serve import Desk, Server


class Death(BaseException):
    """What a kill is inside one process: nothing of the program's may catch it."""


class Elsewhere(Remote):
    """A model that counts every point it really processed, and may kill its client around one of the sendings.

    Args:
        clf: the model; die_at: the number of the sending; late: after it was processed, not before.
    """

    name = "elsewhere"

    def __init__(self, clf: Classifier, die_at: int | None = None, late: bool = True) -> None:
        self.clf, self.die_at, self.late = clf, die_at, late
        self.points = 0
        self.batches: list[int] = []
        self.keys: list[str] = []

    def send(self, x: Tensor, key: str) -> Tensor:
        """Scores, and a death where one was ordered."""
        dies = len(self.batches) == self.die_at
        if dies and not self.late:
            self.die_at = None
            raise Death
        self.points += len(x)
        self.batches.append(len(x))
        self.keys.append(key)
        if dies:
            self.die_at = None
            raise Death
        return self.clf.logits(x)


@contextmanager
def served(oracle: Oracle, **options: Any) -> Iterator[Server]:
    """The reference server, on a free port of this machine."""
    with running(Server(Desk(oracle, **options))) as server:
        yield server


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """A server that serves while open."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


Fault = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Answers with the first three numbers of every point, unless a fault is next."""

    server: Faulty
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """No /info, unless the test gives one."""
        self.say(404 if self.server.info is None else 200, json.dumps(self.server.info).encode())

    def do_POST(self) -> None:
        """The next fault, or an answer."""
        server = self.server
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.inputs = json.loads(raw)["inputs"]
        server.headers.append(dict(self.headers))
        server.sent.append(len(self.inputs))
        fault = server.faults.pop(0) if server.faults else answer
        fault(self)

    def say(self, status: int, body: bytes, **more: str) -> None:
        """A response."""
        self.send_response(status)
        self.send_header("Content-Length", more.pop("length", str(len(body))))
        for name, value in more.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing."""


class Faulty(ThreadingHTTPServer):
    """A server that meets its requests with the faults of a list, and then answers."""

    daemon_threads = True

    def __init__(self, *faults: Fault, info: Any = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults, self.info = list(faults), info
        self.headers: list[dict[str, str]] = []
        self.sent: list[int] = []

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Its faults are on purpose."""


def answer(handler: Handler) -> None:
    """The right answer."""
    scores = [[value for row in point[0] for value in row][:3] for point in handler.inputs]
    handler.say(200, json.dumps({"scores": scores}).encode())


def says(status: int, text: str, **headers: str) -> Fault:
    """A response of this status and text."""
    return lambda handler: handler.say(status, text.encode(), **headers)


def sleeps(seconds: float) -> Fault:
    """No answer for so long."""

    def fault(handler: Handler) -> None:
        threading.Event().wait(seconds)
        answer(handler)

    return fault


def hangs_up(handler: Handler) -> None:
    """Reads the request and closes the connection."""
    handler.close_connection = True


def truncates(handler: Handler) -> None:
    """Promises more than it sends."""
    handler.say(200, b'{"scores": [[0.1', length="5000")
    handler.close_connection = True


def points(n: int) -> Tensor:
    """n points of the box."""
    return torch.rand(n, 1, 2, 2, generator=torch.Generator().manual_seed(0))
