"""A model as an endpoint: a small reference server for what `load_model("http://…")` asks (`robust.wire`).

POST / takes a batch and gives scores or labels, GET /info says what the model is, GET /stats what was answered so far.
It is made for tests and for trying an attack on one's own model over a real socket, not for the open internet.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import socket
import socketserver
import sys
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

from robust import __version__
from robust.classifier import Classifier
from robust.digest import model_digest
from robust.errors import BudgetExceeded, RobustError, first_line
from robust.oracle import Oracle
from robust.wire import ENCODINGS, pack, read_object, unpack

LARGEST_BODY = 1 << 26  # bytes
MOST_POINTS = 4096  # in one request
_REMEMBERED = 1 << 26, 4096  # bytes and number of answers kept for keys that come again
_LONGEST_KEY = 256
_IDLE = 60.0  # seconds after which a silent connection is closed


class Refusal(Exception):
    """A request that gets no answer: a status, one line, and when to come again."""

    def __init__(self, status: int, line: str, wait: float = 0.0) -> None:
        super().__init__(line)
        self.status, self.line, self.wait = status, line, wait


@dataclass(frozen=True)
class _Answered:
    """The answer to a key, with a digest of its question."""

    question: bytes
    body: bytes


class Desk:
    """Answers batches one after the other, whoever asks; no model is safe for several threads.

    Args:
        oracle: the model and what may be asked of it.
        rate: points per second beyond which a batch is put off (429); None for no limit.
        secret: the Authorization that a request must carry; None for none.
    """

    def __init__(self, oracle: Oracle, *, rate: float | None = None, secret: str | None = None) -> None:
        if rate is not None and not 0 < rate < math.inf:
            raise RobustError(f"rate={rate:g} lets nothing through; give points per second above 0")
        self.oracle, self.rate, self.secret = oracle, rate, secret
        self.points = self.requests = self.remembered = 0
        self.lock = threading.Lock()
        self._answers: OrderedDict[str, _Answered] = OrderedDict()
        self._held = 0
        self._ready = 0.0
        self._digest = model_digest(oracle)

    def info(self) -> dict[str, Any]:
        """What the model is and takes."""
        oracle = self.oracle
        return {
            "name": oracle.name,
            "answers": oracle.answers,
            "classes": oracle.known_classes,
            "bounds": list(oracle.bounds),
            "batch": MOST_POINTS,
            "encodings": list(ENCODINGS),
            "digest": self._digest,
        }

    def stats(self) -> dict[str, int]:
        """Points and requests answered by the model, and requests answered from memory."""
        return {"points": self.points, "requests": self.requests, "remembered": self.remembered}

    def admit(self, authorization: str | None) -> None:
        """Refuses who does not carry the secret."""
        if self.secret is None:
            return
        if not hmac.compare_digest((authorization or "").encode(), self.secret.encode()):
            raise Refusal(401, "the Authorization header is missing or wrong")

    def answer(self, raw: bytes, key: str | None) -> bytes:
        """The answer to a batch; one whose key was answered before is not computed, nor counted, again."""
        if key and len(key) > _LONGEST_KEY:
            raise Refusal(400, f"an Idempotency-Key of {len(key)} letters; at most {_LONGEST_KEY} are taken")
        question = hashlib.sha256(raw).digest()
        with self.lock:
            known = self._answers.get(key) if key else None
            if known is not None:
                if known.question != question:
                    raise Refusal(422, "this Idempotency-Key belongs to another batch")
                self.remembered += 1
                return known.body
            x, encoding = self._points(raw)
            self._pace(len(x))
            values = self._ask(x)
            self.points += len(x)
            self.requests += 1
            body = json.dumps({self.oracle.answers: pack(values, encoding)}).encode()
            if key:
                self._remember(key, _Answered(question, body))
            return body

    def _points(self, raw: bytes) -> tuple[Tensor, Any]:
        """The batch of a request, and the encoding in which it came."""
        try:
            data = read_object(raw).get("inputs")
            x = unpack(data).float()
        except ValueError as error:
            raise Refusal(
                400, f'{error}; {{"inputs": [[[[...]]]]}} with images (N, C, H, W) is right'
            ) from None
        if x.dim() != 4 or not x.numel():
            raise Refusal(400, f"inputs have the shape {tuple(x.shape)}; images (N, C, H, W) are right")
        if len(x) > MOST_POINTS:
            raise Refusal(413, f"{len(x)} points in one batch; at most {MOST_POINTS} are taken")
        low, high = self.oracle.bounds
        if not bool(((x >= low) & (x <= high)).all()):
            raise Refusal(400, f"inputs are outside the box [{low:g}, {high:g}], or not finite")
        return x, "base64" if isinstance(data, dict) else "json"

    def _pace(self, points: int) -> None:
        if self.rate is None:
            return
        now = time.monotonic()
        if now < self._ready:
            raise Refusal(429, f"more than {self.rate:g} points per second", self._ready - now)
        self._ready = now + points / self.rate

    def _ask(self, x: Tensor) -> Tensor:
        """Scores or labels; whatever the model makes of the points is one line."""
        oracle = self.oracle
        try:
            if oracle.answers == "labels":
                return oracle.labels(x).cpu()
            scores = oracle.scores(x).cpu()
        except BudgetExceeded as error:
            raise Refusal(403, str(error)) from None
        except (
            RobustError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as e:
            raise Refusal(400, f"the model fails on images {tuple(x.shape[1:])}: {first_line(e)}") from None
        if not bool(scores.isfinite().all()):
            raise Refusal(500, "the model gives scores that are not finite on these inputs")
        return scores

    def _remember(self, key: str, answered: _Answered) -> None:
        self._answers[key] = answered
        self._held += len(answered.body)
        while self._held > _REMEMBERED[0] or len(self._answers) > _REMEMBERED[1]:
            _, oldest = self._answers.popitem(last=False)
            self._held -= len(oldest.body)


class Server(ThreadingHTTPServer):
    """The desk behind a socket.

    Args:
        desk: who answers; host, port: where; port 0 takes a free one.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, desk: Desk, host: str = "127.0.0.1", port: int = 0) -> None:
        self.desk = desk
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) and error.strerror else error
            raise RobustError(f"cannot listen on {host}:{port}: {reason}; choose another --port") from None

    def server_bind(self) -> None:
        """Binds without asking a name server who we are."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    @property
    def url(self) -> str:
        """Where it listens."""
        host = f"[{self.server_name}]" if ":" in self.server_name else self.server_name
        return f"http://{host}:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news; anything else is one line."""
        error = sys.exc_info()[1]
        if error is not None and not isinstance(error, OSError):
            print(f"error: {type(error).__name__}: {first_line(error)}", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """One connection: requests to the desk, answers and refusals as JSON."""

    server: Server
    server_version = f"robust-toolkit/{__version__}"
    sys_version = ""
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    timeout = _IDLE

    def do_GET(self) -> None:
        """/info and /stats."""
        self._reply(self._told)

    def do_POST(self) -> None:
        """A batch."""
        self._reply(self._answered)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Says nothing: a run asks thousands of times."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the base class refuses by itself, in our form."""
        self.close_connection = True
        self._send(int(code), json.dumps({"error": message or "refused"}).encode())

    def _told(self) -> bytes:
        desk, path = self.server.desk, self.path.partition("?")[0]
        desk.admit(self.headers.get("Authorization"))
        found = {"/info": desk.info, "/stats": desk.stats}.get(path)
        if found is None:
            raise Refusal(404, "there is nothing here; POST a batch to /, or GET /info or /stats")
        return json.dumps(found()).encode()

    def _answered(self) -> bytes:
        raw = self._body()
        self.server.desk.admit(self.headers.get("Authorization"))
        if self.path.partition("?")[0] not in ("", "/"):
            raise Refusal(404, "there is nothing here; POST a batch to /")
        return self.server.desk.answer(raw, self.headers.get("Idempotency-Key"))

    def _body(self) -> bytes:
        """The request's body; a refusal that leaves one unread ends the connection."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            raise Refusal(411, "a batch comes with its Content-Length")
        if int(length) > LARGEST_BODY:
            self.close_connection = True
            raise Refusal(413, f"a batch of {int(length)} bytes; at most {LARGEST_BODY} are taken")
        raw = self.rfile.read(int(length))
        if len(raw) < int(length):
            self.close_connection = True
            raise Refusal(400, "the batch broke off")
        return raw

    def _reply(self, find: Any) -> None:
        """What `find` returns, or the line of its refusal; never a traceback."""
        try:
            self._send(200, find())
        except Refusal as refusal:
            more = {"Retry-After": str(math.ceil(refusal.wait))} if refusal.wait else {}
            self._send(refusal.status, json.dumps({"error": refusal.line}).encode(), more)
        except OSError:
            self.close_connection = True  # the client went away
        except Exception as error:  # noqa: BLE001 the client gets a line, whatever happened
            line = f"{type(error).__name__}: {first_line(error)}"
            print(f"error: {line}", file=sys.stderr, flush=True)
            self._send(500, json.dumps({"error": "the server failed"}).encode())

    def _send(self, status: int, body: bytes, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (more or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()


def desk_for(
    model: Classifier | Oracle, *, answers: Any, budget: int | None, rate: float | None, secret: str | None
) -> Desk:
    """The desk of a loaded model."""
    if isinstance(model, Classifier):
        model = Oracle(model, answers=answers, budget=budget)
    elif (model.answers, model.budget) != (answers, budget):
        model = Oracle(
            model.backend, answers=answers, budget=budget, classes=model.known_classes, batch=model.batch
        )
    with torch.no_grad():
        return Desk(model, rate=rate, secret=secret)
