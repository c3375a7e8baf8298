"""An http(s) model over real loopback sockets: exact numbers, honest counts, and faults that end in one line."""

from __future__ import annotations

import base64
import json
import socket
import ssl
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from robust import Linf, Oracle, evaluate, load_model
from robust.attacks import get
from robust.errors import ModelError, RobustError
from robust.models.http import _seconds
from robust.wire import ENCODINGS, pack, unpack
from tests.robust.elsewhere import Faulty, answer, hangs_up, points, running, says, served, sleeps, truncates
from tests.robust.subjects import linear

SECRET = "Bearer s3cr3t-t0ken"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long the client waited between tries, without waiting."""
    found: list[float] = []
    monkeypatch.setattr("robust.oracle.time.sleep", found.append)
    return found


def load(server: Any, **options: Any) -> Oracle:
    """An oracle on a server."""
    oracle = load_model(server if isinstance(server, str) else server.url, **options)
    assert isinstance(oracle, Oracle)
    return oracle


# -- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_float32_survives_the_round_trip(encoding: Any) -> None:
    bits = torch.randint(-(2**31), 2**31 - 1, (4096,), generator=torch.Generator().manual_seed(0))
    values = bits.to(torch.int32).view(torch.float32)
    odd = torch.tensor([0.1, -0.0, 1e-45, 3.4028235e38, 1 / 3])
    values = torch.cat([values[values.isfinite()], odd]).view(-1, 1)
    back = unpack(json.loads(json.dumps(pack(values, encoding))))
    assert back.dtype == torch.float32
    assert back.numpy().tobytes() == values.numpy().tobytes()
    labels = torch.tensor([0, -1, 2**40])
    assert torch.equal(unpack(json.loads(json.dumps(pack(labels, encoding)))), labels)


@pytest.mark.parametrize(
    "data",
    [None, 3, "x", {"shape": [2]}, [[1, 2], [3]], ["a"], [[True, None]], [1e400, {}],
     {"shape": [3], "type": "float32", "base64": base64.b64encode(b"12345678").decode()},
     {"shape": [2], "type": "float32", "base64": "§"}, {"shape": [-2], "type": "float32", "base64": ""}],
)  # fmt: skip
def test_what_is_no_array_is_one_line(data: Any) -> None:
    with pytest.raises(ValueError) as error:
        unpack(data)
    assert "\n" not in str(error.value)


def test_a_list_s_numbers_beyond_float32_are_infinite() -> None:
    assert unpack([1e39, -1e39]).tolist() == [np.inf, -np.inf]


# -- the same as the model --------------------------------------------------------------------------------------


def test_scores_over_a_socket_are_the_model_s_bit_for_bit() -> None:
    clf, x, _, _ = linear(n=20)
    with served(Oracle(clf)) as server:
        remote = load(server, endpoint={"batch": 8})
        local = Oracle(clf, batch=8)
        assert torch.equal(remote.scores(x), local.scores(x))
        assert (remote.bounds, remote.classes, remote.remote) == (clf.bounds, 3, True)
        assert remote.backend.encoding == "base64"
        assert (remote.cost.queries, server.desk.stats()) == (
            20,
            {"points": 20, "requests": 3, "remembered": 0},
        )
    with running(Faulty()) as plain:  # without /info, and nested lists
        oracle = load(plain, bounds=(-1, 2))
        assert torch.equal(oracle.scores(points(3)), points(3).flatten(1)[:, :3])
        assert oracle.bounds == (-1, 2)
        keys = {headers["Idempotency-Key"] for headers in plain.headers}
        oracle.scores(points(3))
        assert len(keys | {headers["Idempotency-Key"] for headers in plain.headers}) == 2


@pytest.mark.parametrize(
    ("name", "answers"), [("square", "scores"), ("hopskipjump", "labels"), ("rays", "labels")]
)
def test_an_attack_over_a_socket_is_the_attack_on_the_model(name: str, answers: Any) -> None:
    clf, x, y, _ = linear(n=8, wrong=1)
    attack = get(name)(threat=Linf(0.05), queries=120)
    local = attack.run(Oracle(clf, answers=answers, classes=3), x, y)
    with served(Oracle(clf, answers=answers)) as server:
        remote = load(server, answers=answers, classes=3)
        found = attack.run(remote, x, y)
        spent = server.desk.stats()["points"]
    assert int(local.success.sum()) > 0
    assert torch.equal(found.x_adv, local.x_adv)
    assert torch.equal(found.success, local.success)
    assert torch.equal(found.queries, local.queries)
    assert found.cost.queries == local.cost.queries == remote.cost.queries == spent


def test_a_verdict_over_a_socket_is_the_verdict_on_the_model_and_can_be_checked_with_it(
    tmp_path: Path,
) -> None:
    clf, x, y, _ = linear(n=12, wrong=1)
    call: dict[str, Any] = {"threat": Linf(0.05), "suite": ["square"], "report": False}
    local = evaluate(Oracle(clf), x, y, **call)
    with served(Oracle(clf)) as server:
        verdict = evaluate(load(server), x, y, out=tmp_path / "run", **call)
        assert verdict.cost["queries"] == server.desk.points
    assert repr(verdict.samples) == repr(local.samples)
    assert torch.equal(verdict.adversarial, local.adversarial)
    assert verdict.manifest["model"]["digest"] == clf.digest(), "as the server says"
    verdict.verify(clf, x, y)


# -- faults -----------------------------------------------------------------------------------------------------


def test_nobody_there_is_one_line_at_once() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ModelError) as error:
        load(url)
    assert str(error.value).startswith(f"{url} does not answer: no connection: ")
    assert "refused" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_refused_connection_is_tried_again_and_costs_nothing(waits: list[float]) -> None:
    with running(Faulty()) as server:
        oracle = load(server, endpoint={"retries": 3})
    oracle.backend._pool.clear()  # else the old connection's thread still answers
    with pytest.raises(ModelError, match=r"did not answer after 4 tries: no connection: .*refused"):
        oracle.scores(points(5))
    assert (oracle.cost.queries, oracle.repeated) == (0, 0)
    assert waits == [0.1, 0.2, 0.4]


def test_a_timeout_costs_again_and_the_key_stays(waits: list[float]) -> None:
    with running(Faulty(sleeps(1.5))) as server:
        oracle = load(server, endpoint={"timeout": 0.3})
        assert torch.equal(oracle.scores(points(5)), points(5).flatten(1)[:, :3])
        assert (oracle.cost.queries, oracle.repeated, server.sent) == (10, 5, [5, 5])
        assert len({headers["Idempotency-Key"] for headers in server.headers}) == 1


@pytest.mark.parametrize("fault", [hangs_up, truncates, says(502, "bad gateway"), says(504, "")])
def test_an_answer_that_was_lost_costs_again(fault: Any, waits: list[float]) -> None:
    with running(Faulty(fault, fault)) as server:
        oracle = load(server)
        assert torch.equal(oracle.scores(points(5)), points(5).flatten(1)[:, :3])
        assert (oracle.cost.queries, oracle.repeated) == (15, 10) == (sum(server.sent), 10)


def test_too_much_at_once_is_sent_again_when_the_endpoint_says_and_costs_nothing(waits: list[float]) -> None:
    busy = (says(429, "slow down", Retry_After="7"), says(503, "", Retry_After="0"))
    with running(Faulty(*busy)) as server:
        oracle = load(server)
        oracle.scores(points(5))
        assert (oracle.cost.queries, oracle.repeated) == (5, 0)
    assert waits == [7, 0.2]
    with running(Faulty(says(429, "tomorrow", Retry_After="86400"))) as server:
        oracle = load(server)
        with pytest.raises(ModelError, match="did not answer at the first try: 429: tomorrow"):
            oracle.scores(points(5))
    assert len(waits) == 2, "nobody waits until tomorrow"


def test_retry_after_is_seconds_or_a_date() -> None:
    assert _seconds("12") == 12
    assert _seconds(None) == _seconds("soon") == _seconds("-5") == 0
    assert 28 < _seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)) <= 30
    assert _seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (says(500, '{"error": "out of\\nmemory"}'), "answered 500: out of memory"),
        (says(400, "<p>bad</p>"), "answered 400: <p>bad</p>"),
        (says(301, "", Location="http://other/"), r"is somewhere else \(301\): http://other/; give that address"),
        (says(401, "no"), r"refuses with 401: no; does it want --endpoint auth=NAME\?"),
        (says(200, "<html><body>Welcome</body></html>"), "answered no JSON, but <html><body>Welcome"),
        (says(200, "[1, 2]"), r"answered JSON, but no object, but \[1, 2\]"),
        (says(200, '{"result": 1}'), "answered no scores and no labels, but {'result': 1}"),
        (says(200, '{"scores": [[1, 2], [3, 4]]}'), r"answered scores of the shape \(2, 2\) to 3 points"),
        (says(200, '{"scores": [1, 2, 3]}'), r"answered scores of the shape \(3,\) to 3 points"),
        (says(200, '{"scores": [[1, 2], [3], [4]]}'), "answered with a list whose rows have different lengths"),
        (says(200, '{"scores": [["a"], ["b"], ["c"]]}'), "answered with a list that holds something else"),
        (says(200, '{"scores": [[1, NaN], [1, 2], [1, 2]]}'), "answered scores that are not finite"),
        (says(200, '{"scores": [[1, 1e999], [1, 2], [1, 2]]}'), "answered scores that are not finite"),
        (says(200, '{"scores": [[], [], []]}'), r"answered scores of the shape \(3, 0\) to 3 points"),
        (says(200, '{"labels": [1, 2, 3]}'), "gives labels only; ask for answers=labels"),
    ],
)  # fmt: skip
def test_junk_is_one_line_that_names_the_endpoint(fault: Any, line: str) -> None:
    with running(Faulty(fault)) as server:
        oracle = load(server, answers="scores")
        with pytest.raises(ModelError, match=f"^{server.url} {line}") as error:
            oracle.scores(points(3))
        assert "\n" not in str(error.value)
        assert (oracle.cost.queries, len(server.sent)) == (3, 1), "no second try, and no free one"


def test_scores_of_another_length_and_labels_beyond_the_classes_are_one_line() -> None:
    with running(Faulty(answer, says(200, '{"scores": [[1, 2, 3, 4]]}'))) as server:
        oracle = load(server)
        oracle.scores(points(1))
        with pytest.raises(ModelError, match=r"\(1, 4\) to 1 points; one row of scores each, of one length"):
            oracle.scores(points(1))
    for text, line in (('{"labels": [3]}', "answered the class 3, but has 3"), ('{"labels": [0.5]}', "no classes"),
                       ('{"labels": [-2]}', "no classes")):  # fmt: skip
        with running(Faulty(says(200, text))) as server, pytest.raises(ModelError, match=line):
            load(server, answers="labels", classes=3).labels(points(1))
    with running(Faulty(says(200, '{"labels": [-1]}'))) as server:
        assert load(server, answers="labels", classes=3).labels(points(1)).tolist() == [-1], "no class at all"


# -- what the endpoint says of itself ---------------------------------------------------------------------------


def test_info_tells_bounds_classes_answers_and_identity() -> None:
    info = {"bounds": [0, 255], "classes": 7, "answers": "labels", "digest": "abc", "name": "m", "batch": 2}
    with running(Faulty(info=info)) as server:
        oracle = load(server)
        assert (oracle.bounds, oracle.classes, oracle.answers, oracle.batch) == ((0, 255), 7, "labels", 2)
        assert oracle.backend.digest() == "abc"
        with pytest.raises(ModelError, match="gives labels only; ask for answers=labels"):
            load(server, answers="scores")
        with pytest.raises(ModelError, match=r"takes inputs in \[0.0, 255.0\]; leave out other bounds"):
            load(server, bounds=(-1, 1))
    for info in ({"bounds": [1, 0]}, {"bounds": "all"}, {"bounds": [0, float("nan")]}):
        with (
            running(Faulty(info=info)) as server,
            pytest.raises(ModelError, match="says at /info that its bounds"),
        ):
            load(server)
    with running(Faulty(info=[1, 2])) as server:
        assert load(server).backend.info == {}
        assert load(server).backend.digest() == f"endpoint:{server.url}"


@pytest.mark.parametrize(
    ("spec", "options", "line"),
    [
        ("http://", {}, "lacks what stands behind the colon"),
        ("http:///path", {}, "names no host"),
        ("http://h:x", {}, "is no address"),
        ("https://me:pass@host/", {}, "leave user and password out of the address of host"),
        ("http://h", {"mean": 0.5}, "normalises for itself; leave out mean and std"),
        ("http://h", {"device": "cpu"}, "leave out device=cpu"),
        ("http://h", {"weights": "w"}, "has its own weights"),
        ("http://h", {"endpoint": {"timeout": 0}}, "timeout=0 is no time to wait"),
        ("http://h", {"endpoint": {"rate": -1}}, "rate=-1 sends nothing"),
        ("http://h", {"endpoint": {"batch": 0}}, "batch=0 must be at least"),
        ("http://h", {"endpoint": {"tiemout": 1}}, "did you mean 'timeout'"),
        ("zoo:digits", {"endpoint": {"timeout": 1}}, "is no endpoint"),
    ],
)
def test_impossible_requests_are_one_line(spec: str, options: dict[str, Any], line: str) -> None:
    with pytest.raises(RobustError, match=line) as error:
        load_model(spec, **options)
    assert "\n" not in str(error.value)
    assert "pass@" not in str(error.value)


# -- rate and secret --------------------------------------------------------------------------------------------


def test_the_rate_is_kept() -> None:
    with running(Faulty()) as server:
        oracle = load(server, endpoint={"rate": 50, "batch": 5})
        started = time.monotonic()
        oracle.scores(points(20))
        assert time.monotonic() - started >= 0.3, "three waits of 5 points at 50 a second"


def test_the_secret_is_sent_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("API_TOKEN", SECRET)
    clf, x, y, _ = linear(n=6, wrong=1)
    with served(Oracle(clf), secret=SECRET) as server:
        oracle = load(server, endpoint={"auth": "API_TOKEN"}, budget=60)
        call: dict[str, Any] = {"threat": Linf(0.02), "suite": ["simba"], "out": tmp_path / "run"}
        evaluate(oracle, x, y, **call)
        with pytest.raises(ModelError, match=r"refuses with 401: .*; does it want --endpoint auth=NAME"):
            load(server)
        monkeypatch.setenv("WRONG", "Bearer wrong-one")
        with pytest.raises(ModelError, match="is the value of WRONG right") as error:
            load(server, endpoint={"auth": "WRONG"})
        assert "wrong-one" not in str(error.value)
    for echo in (SECRET, SECRET.split()[1]):
        with running(Faulty(says(500, f"your header was {echo}"))) as server:
            with pytest.raises(ModelError, match=r"your header was .*\*\*\*") as error:
                load(server, endpoint={"auth": "API_TOKEN"}).scores(x)
            assert server.headers[0]["Authorization"] == SECRET
            assert "s3cr3t" not in str(error.value)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert b"API_TOKEN" in written
    assert b"s3cr3t" not in written
    assert "s3cr3t" not in repr(vars(oracle)) + repr(oracle.backend.describe()) + "".join(capfd.readouterr())


def test_a_secret_in_the_place_of_its_name_is_refused_without_repeating_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, line in ((SECRET, "never the secret itself"), ("ABSENT_NAME", "ABSENT_NAME is not set")):
        with pytest.raises(RobustError, match=line) as error:
            load_model("http://127.0.0.1:1", endpoint={"auth": name})
        assert "s3cr3t" not in str(error.value)
    monkeypatch.setenv("BROKEN", "a\nb")
    with pytest.raises(RobustError, match="characters that no header can have"):
        load_model("http://127.0.0.1:1", endpoint={"auth": "BROKEN"})


def test_a_server_that_speaks_no_tls_is_one_line() -> None:
    assert ssl.HAS_SNI
    with running(Faulty()) as server, pytest.raises(ModelError) as error:
        load(server.url.replace("http:", "https:"))
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("https://127.0.0.1:")
