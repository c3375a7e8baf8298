"""`robust serve`'s desk and socket: what is wrong is one line of JSON, and a key that comes again is not paid twice."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from robust import Oracle
from robust.errors import RobustError
from robust.serve import LARGEST_BODY, MOST_POINTS, Desk, Refusal, Server
from tests.robust.elsewhere import points, served
from tests.robust.subjects import linear

CLF, X, Y, _ = linear(n=6)


def ask(
    server: Server, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, dict[str, Any], Any]:
    """Status, content and headers of one request."""
    raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    line.request(method, path, raw, {name.replace("_", "-"): value for name, value in headers.items()})
    response = line.getresponse()
    content = json.loads(response.read())
    line.close()
    return response.status, content, response.headers


def batch(x: Tensor = X) -> dict[str, Any]:
    """A batch as nested lists."""
    return {"inputs": x.tolist()}


def test_a_batch_gives_scores_or_labels_and_counts() -> None:
    with served(Oracle(CLF)) as server:
        status, content, headers = ask(server, "POST", "/", batch())
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert torch.equal(torch.tensor(content["scores"]), CLF.logits(X))
        assert ask(server, "GET", "/stats")[1] == {"points": 6, "requests": 1, "remembered": 0}
        info = ask(server, "GET", "/info")[1]
        assert (info["classes"], info["bounds"], info["digest"]) == (3, [0, 1], CLF.digest())
    with served(Oracle(CLF, answers="labels")) as server:
        assert ask(server, "POST", "/", batch())[1] == {"labels": CLF.logits(X).argmax(1).tolist()}


@pytest.mark.parametrize(
    ("body", "status", "line"),
    [
        (b"{", 400, "no JSON"),
        (b"[" * 100_000, 400, "no JSON"),
        (b"\xff\xfe", 400, "no JSON"),
        (b"[1]", 400, "no object"),
        ({}, 400, "a list of numbers is right"),
        ({"inputs": [[1]]}, 400, r"shape (1, 1); images (N, C, H, W) are right"),
        ({"inputs": []}, 400, "images (N, C, H, W) are right"),
        ({"inputs": [[[["a"]]]]}, 400, "something else than numbers"),
        ({"inputs": {"shape": [1, 1, 3, 4], "type": "float32", "base64": "AAAA"}}, 400, "3 bytes"),
        ({"inputs": {"shape": [10**9, 10**9, 1, 1], "type": "float32", "base64": ""}}, 400, "0 bytes"),
        (batch(X + 1), 400, "outside the box [0, 1]"),
        (batch(X * torch.nan), 400, "outside the box [0, 1], or not finite"),
        (batch(torch.rand(1, 1, 2, 2)), 400, "the model fails on images (1, 2, 2): "),
        (batch(torch.zeros(MOST_POINTS + 1, 1, 1, 1)), 413, "at most 4096 are taken"),
    ],
)  # fmt: skip
def test_a_bad_batch_is_one_line_and_costs_nothing(body: Any, status: int, line: str) -> None:
    with served(Oracle(CLF)) as server:
        found, content, _ = ask(server, "POST", "/", body)
        assert found == status
        assert line in content["error"]
        assert "\n" not in content["error"]
        assert "Traceback" not in content["error"]
        assert server.desk.points == 0
        assert ask(server, "POST", "/", batch())[0] == 200, "and the next one is answered"


def test_bodies_that_are_too_large_cut_short_or_of_unknown_length_are_refused() -> None:
    with served(Oracle(CLF)) as server:
        for header, status in ((f"Content-Length: {LARGEST_BODY + 1}", 413), ("Transfer-Encoding: chunked", 411),
                               ("Content-Length: -5", 411)):  # fmt: skip
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
                line.sendall(f"POST / HTTP/1.1\r\nHost: x\r\n{header}\r\n\r\n".encode())
                assert line.recv(100).startswith(f"HTTP/1.1 {status}".encode())
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as line:
            line.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{}")
            line.shutdown(socket.SHUT_WR)
            assert b"the batch broke off" in line.recv(1000)


def test_other_paths_and_methods_are_refused() -> None:
    with served(Oracle(CLF)) as server:
        assert ask(server, "GET", "/")[0] == 404
        assert ask(server, "POST", "/info", batch())[0] == 404
        assert ask(server, "PUT", "/", batch())[0] == 501
        assert "error" in ask(server, "DELETE", "/")[1]


def test_a_key_that_comes_again_is_answered_from_memory() -> None:
    with served(Oracle(CLF, budget=8)) as server:
        first = ask(server, "POST", "/", batch(), Idempotency_Key="k")
        again = ask(server, "POST", "/", batch(), Idempotency_Key="k")
        assert first[:2] == again[:2]
        assert server.desk.stats() == {"points": 6, "requests": 1, "remembered": 1}
        assert ask(server, "POST", "/", batch(X[:2]), Idempotency_Key="k")[0] == 422, "another batch"
        assert ask(server, "POST", "/", batch(X[:2]))[0] == 200
        status, content, _ = ask(server, "POST", "/", batch(X[:1]))
        assert (status, content["error"]) == (403, "the query budget of 8 is spent: 1 asked, 0 left")


def test_the_memory_for_keys_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust.serve._REMEMBERED", (10_000, 3))
    desk = Desk(Oracle(CLF))
    raw = json.dumps(batch()).encode()
    for key in "abcde":
        desk.answer(raw, key)
    assert list(desk._answers) == ["c", "d", "e"]
    with pytest.raises(Refusal, match="257 letters"):
        desk.answer(raw, "k" * 257)
    monkeypatch.setattr("robust.serve._REMEMBERED", (1, 3))
    desk.answer(raw, "f")
    assert (list(desk._answers), desk._held) == ([], 0)


def test_the_same_key_from_two_threads_is_computed_once() -> None:
    def slow(x: Tensor) -> Tensor:
        time.sleep(0.2)
        return CLF.logits(x)

    with served(Oracle(slow)) as server:
        threads = [threading.Thread(target=ask, args=(server, "POST", "/", batch()), kwargs={"Idempotency_Key": "k"})
                   for _ in range(3)]  # fmt: skip
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert server.desk.stats() == {"points": 6, "requests": 1, "remembered": 2}


def test_a_rate_puts_batches_off() -> None:
    with served(Oracle(CLF), rate=4) as server:
        assert ask(server, "POST", "/", batch())[0] == 200
        status, _, headers = ask(server, "POST", "/", batch())
        assert (status, headers["Retry-After"]) == (429, "2")
        assert server.desk.points == 6
    with pytest.raises(RobustError, match="rate=0 lets nothing through"):
        Desk(Oracle(CLF), rate=0)


def test_without_the_secret_nothing_is_told() -> None:
    with served(Oracle(CLF), secret="Bearer x") as server:
        for method, path in (("POST", "/"), ("GET", "/info"), ("GET", "/stats")):
            for headers in ({}, {"Authorization": "Bearer y"}, {"Authorization": "Bearer ü"}):
                assert ask(server, method, path, batch() if method == "POST" else None, **headers)[0] == 401
        assert ask(server, "POST", "/", batch(), Authorization="Bearer x")[0] == 200


def test_whatever_breaks_inside_is_a_line_and_no_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    def broken(x: Tensor) -> Tensor:
        raise KeyboardInterrupt if x.sum() < 0 else MemoryError("no\nroom")

    with served(Oracle(broken)) as server:
        assert ask(server, "POST", "/", batch())[:2] == (500, {"error": "the server failed"})
    nan = Oracle(lambda x: torch.full((len(x), 3), torch.nan))
    with served(nan) as server:
        assert ask(server, "POST", "/", batch())[0] == 500
    assert "Traceback" not in "".join(capfd.readouterr())
    with pytest.raises(Refusal):
        Desk(nan).answer(json.dumps(batch(points(1))).encode(), None)


def test_a_port_in_use_is_one_line() -> None:
    with served(Oracle(CLF)) as server, pytest.raises(RobustError) as error:
        Server(Desk(Oracle(CLF)), port=server.server_port)
    assert str(error.value).startswith(
        f"cannot listen on 127.0.0.1:{server.server_port}: Address already in use"
    )
