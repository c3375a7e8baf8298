"""`robust eval`, `attack` and `report` on models that give answers only: files, endpoints, local ones on request."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from robust import Oracle, Verdict, load_model
from robust.cli.main import run
from robust.serve import Server
from tests.robust.elsewhere import Faulty, running, served

DATA = ["--data", "digits", "--n", "10", "--eps", "0.2"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture(scope="module")
def scores() -> Iterator[Server]:
    """The digits model's scores."""
    with served(Oracle(load_model("zoo:digits"))) as server:
        yield server


@pytest.fixture(scope="module")
def labels() -> Iterator[Server]:
    """Its labels."""
    with served(Oracle(load_model("zoo:digits"), answers="labels")) as server:
        yield server


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The object that a command prints."""
    sys.argv = ["robust", *arguments, "--json"]  # which the manifest notes
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The error of a command that refuses, having written nothing."""
    assert run(list(arguments)) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert not Path("runs").exists()
    return text


def test_eval_of_an_endpoint_is_eval_of_the_model_s_scores_and_can_be_verified(
    scores: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    before = scores.desk.points
    found = said(capsys, "eval", scores.url, *DATA, "--out", "far")
    local = said(capsys, "eval", "zoo:digits", *DATA, "--answers", "scores", "--out", "near")
    assert (found["suite"], local["suite"]) == ("score", "score")
    assert found["cost"]["queries"] == local["cost"]["queries"] == scores.desk.points - before
    assert repr(Verdict.load("far").samples) == repr(Verdict.load("near").samples)
    assert run(["report", "far", "--verify"]) == 0
    assert run(["report", "far"]) == 0
    assert "127.0.0.1" in Path("far/report.html").read_text()
    assert run(["report", "far", "zoo:digits", "--verify"]) == 0, "the model itself says the same"


def test_labels_have_a_suite_of_their_own(labels: Server, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, "eval", labels.url, *DATA, "--answers", "labels", "--budget", "400", "--out", "run")
    assert found["suite"] == "decision"
    assert 200 < found["cost"]["queries"] <= 400
    assert Verdict.load("run").manifest["oracle"]["answers"] == "labels"


@pytest.mark.parametrize("name", ["square", "hopskipjump", "rays"])
def test_attack_over_a_socket_is_attack_on_the_model(
    name: str, scores: Server, labels: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = "scores" if name == "square" else "labels"
    server = scores if name == "square" else labels
    before = server.desk.points
    options = [*DATA, "--set", "queries=150", "--answers", kind]
    far, near = (said(capsys, "attack", name, model, *options) for model in (server.url, "zoo:digits"))
    for key in ("broken", "success_rate", "robust_accuracy", "median_linf", "curve", "oracle"):
        assert far[key] == near[key], key
    assert far["broken"] > 0
    assert far["cost"]["queries"] == near["cost"]["queries"] == server.desk.points - before
    assert far["oracle"]["attack_queries"] == far["cost"]["queries"] - 20, "one look before and one after"


def test_attack_keeps_a_budget_and_says_when_it_was_spent(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["attack", "square", "zoo:digits", "--data", "digits", "--n", "10", "--eps", "0.01"]
    found = said(capsys, *options, "--budget", "200")
    assert 150 < found["cost"]["queries"] <= 200
    assert found["oracle"]["budget"] == 200
    assert any("the query budget was spent" in text for text in found["warnings"])
    assert "39 queries are too few to attack 10 samples; give at least 40" in line(
        capsys, *options, "--budget", "39"
    )


def test_targets_of_an_oracle(labels: Server, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["attack", "hopskipjump", labels.url, *DATA, "--set", "queries=60", "--answers", "labels"]
    before = labels.desk.points
    found = said(capsys, *options, "--target", "3")
    assert found["cost"]["queries"] == labels.desk.points - before
    assert said(capsys, *options, "--target", "random")["attempted"] == 10
    assert "second needs scores, and the model gives labels" in line(capsys, *options, "--target", "second")
    assert "--target: 10 is no class; the model has the classes 0 to 9" in line(
        capsys, *options, "--target", "10"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "http://127.0.0.1:1", *DATA], "http://127.0.0.1:1 does not answer: no connection: "),
        (["eval", "http://127.0.0.1:1", *DATA, "--suite", "standard"], "suite standard needs gradients"),
        (["eval", "http://127.0.0.1:1", *DATA, "--answers", "logits"], "--answers: unknown kind of answers 'logits'"),
        (["eval", "http://127.0.0.1:1", *DATA, "--budget", "0"], "--budget: 0 allows no query"),
        (["eval", "http://127.0.0.1:1", *DATA, "--classes", "1"], "--classes: 1 is too few"),
        (["eval", "http://127.0.0.1:1", *DATA, "--endpoint", "speed=3"], "--endpoint: unknown key 'speed'"),
        (["eval", "http://127.0.0.1:1", *DATA, "--endpoint", "timeout"], "write it like timeout=10"),
        (["eval", "http://127.0.0.1:1", *DATA, "--endpoint", "timeout=soon"], "--endpoint: timeout"),
        (["eval", "http://127.0.0.1:1", *DATA, "--endpoint", "auth=Bearer abc"], "never the secret itself"),
        (["eval", "http://127.0.0.1:1", *DATA, "--endpoint", "auth=123"], "never the secret itself"),
        (["eval", "http://127.0.0.1:1", "--eps", "0.1"], "--data is missing"),
        (["eval", "onnx:none.onnx", *DATA], "none.onnx does not exist; give onnx:FILE"),
        (["eval", "zoo:digits", *DATA, "--endpoint", "timeout=3"], "zoo:digits is no endpoint"),
        (["attack", "pgd", "http://127.0.0.1:1", *DATA], "pgd needs gradients, and of http://127.0.0.1:1 only answers"),
        (["train", "onnx:none.onnx", "--data", "digits", "--out", "x"], "gives answers only"),
        (["serve", "zoo:digits", "--port", "99999"], "--port: 99999 is no port"),
        (["serve", "zoo:digits", "--answers", "both"], "--answers: unknown kind of answers"),
        (["serve", "zoo:digits", "--auth", "NOT_SET_HERE"], "the environment variable NOT_SET_HERE is not set"),
        (["serve", "zoo:digits", "--rate", "0"], "rate=0 lets nothing through"),
        (["serve", "zoo:digit"], "unknown zoo model 'digit'; did you mean digits"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = line(capsys, *arguments)
    assert expected in text
    assert "abc" not in text


def test_an_endpoint_of_labels_is_not_taken_for_one_of_scores(
    labels: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"{labels.url} gives labels only; add --answers labels" in line(capsys, "eval", labels.url, *DATA)


def test_an_endpoint_s_own_box_is_the_data_s(capsys: pytest.CaptureFixture[str]) -> None:
    with running(Faulty(info={"bounds": [0, 255], "classes": 10})) as server:
        assert run(["eval", server.url, *DATA, "--suite", "square", "--budget", "30"]) == 2
        assert len(server.sent) == 1
        assert "answered scores of the shape" in capsys.readouterr().err, "its answers are no 10 classes"


def test_an_onnx_file_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx", reason="ONNX tests need the extra `test` (onnx)")
    pytest.importorskip("onnxruntime", reason="ONNX tests need the extra `onnx` (onnxruntime)")
    from tests.robust.test_onnx import build

    build(Path("m.onnx"), (None, 1, 3, 4))
    import numpy as np

    x = np.random.default_rng(0).random((6, 1, 3, 4), dtype=np.float32)
    np.savez("data.npz", x=x, y=np.arange(6) % 3, layout="NCHW")
    options = ["--data", "npz:data.npz", "--eps", "0.1", "--budget", "200"]
    found = said(capsys, "eval", "onnx:m.onnx", *options, "--out", "run")
    assert (found["suite"], found["n"]) == ("score", 6)
    assert run(["report", "run", "--verify"]) == 0
    assert said(capsys, "attack", "rays", "onnx:m.onnx", *options, "--answers", "labels")["n"] == 6
