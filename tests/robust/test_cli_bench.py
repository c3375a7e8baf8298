"""`robust bench`: one line for bad input and nothing written, a record and a table otherwise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robust.cli.main import run
from robust.registry import room
from tests.robust.test_cli import answer, complaint

TINY = ["bench", "attacks", "--n", "4", "--repeats", "1", "--precision", "original", "--device", "cpu"]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No peer is installed."""
    line = {"foolbox": "foolbox is not installed; pip install foolbox"}
    monkeypatch.setattr("robust.experiments.benchmarks.attacks.available", lambda *given: ({}, line))


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["atacks"], "unknown benchmark 'atacks'; did you mean attacks"),
        (["attacks", "--only", "foolboxx"], "its peers are torchattacks, foolbox, art"),
        (["kernels", "--only", "foolbox"], "its peers are none"),
        (["attacks", "--precision", "float23"], "did you mean float32"),
        (["attacks", "--repeats", "0"], "--repeats: 0 rounds measure nothing"),
        (["attacks", "--threads", "0"], "--threads: 0 threads cannot work"),
        (["attacks", "--n", "0"], "--n: 0 samples"),
        (["attacks", "--eps", "8"], "did you mean 8/255?"),
        (["attacks", "--eps", "0.1,0.2"], "--eps: a benchmark takes one radius"),
        (["attacks", "--model", "zoo:digitz", "--data", "digits"], "unknown zoo model"),
        (["attacks", "--weights", "absent.pt"], "--weights: absent.pt does not exist"),
        (["attacks", "--frobnicate"], "frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    arguments: list[str],
    part: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert part in complaint(capsys, "bench", *arguments, "--out", "new/record.json")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    line = complaint(capsys, *TINY, "--out", str(tmp_path / "file" / "record.json"))
    assert "is a file" in line


@pytest.mark.usefixtures("alone")
def test_bench_writes_a_record_and_prints_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "new" / "record.json"
    text = answer(capsys, *TINY, "--out", str(place))
    record = json.loads(place.read_text())
    assert record["settings"]["model"] == "zoo:digits"
    assert record["settings"]["threads"] == 1
    assert list(record["contestants"]) == ["original", "original, until broken"]
    assert "original" in text
    assert "foolbox is not installed" in text
    assert str(place) in text


@pytest.mark.usefixtures("alone")
def test_json_is_one_object_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "record.json"
    found = json.loads(answer(capsys, *TINY, "--out", str(place), "--json"))
    assert found.pop("out") == str(place)
    assert found == json.loads(place.read_text())


@pytest.mark.usefixtures("alone")
def test_a_wrong_result_ends_with_code_1_and_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from robust.experiments.benchmarks import attacks

    def shifted(own: Any, eps: float, *others: Any) -> Any:
        result = real(own, eps, *others)
        result.x_adv.add_(1)
        return result

    real = attacks._pgd
    monkeypatch.setattr(attacks, "_pgd", shifted)
    place = tmp_path / "record.json"
    assert run([*TINY, "--out", str(place)]) == 1
    assert "points of ours lie outside the ball" in capsys.readouterr().err
    assert not place.exists()


def test_a_backend_that_cannot_run_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from robust.cuda_ops.dispatch import BackendError

    def fail() -> None:
        raise BackendError("ROBUST_OPS=cuda needs a GPU")

    monkeypatch.setattr("robust.cli.list.list_names", fail)
    assert complaint(capsys, "list") == "ROBUST_OPS=cuda needs a GPU"


def test_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(answer(capsys, "list", "benchmarks", "--json"))["rows"]
    assert [row["name"] for row in rows] == list(room("experiments.benchmarks"))
