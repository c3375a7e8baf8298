"""`robust eval`: a verdict from one command, in a folder of its own, that can be stopped and continued."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from robust import Verdict
from robust.cli.main import run

MODEL = """
import torch
from torch import nn

def net():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4)[:2])
    return model
"""
SUBJECT = ["eval", "model.py:net", "--data", "npz:data.npz", "--suite", "pgd"]
NAME = "net-data.npz-linf-0.1-pgd-seed0"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with ten samples of two classes: one wrong, three that fall at 0.025, six at 0.25."""
    (tmp_path / "model.py").write_text(MODEL)
    y = np.arange(10) % 2
    x = np.full((10, 4), 0.4, np.float32)
    x[np.arange(10), y] = [0.3] + [0.45] * 3 + [0.9] * 6
    np.savez(tmp_path / "data.npz", x=x.reshape(10, 1, 2, 2), y=y, layout="NCHW")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_eval_prints_one_object_with_the_verdict(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SUBJECT, "--eps", "0.1", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert (found["clean_accuracy"], found["robust_accuracy"], found["n"]) == (0.9, 0.6, 10)
    assert found["out"] == f"runs/{NAME}"
    assert found["suite"] == "pgd"
    assert found["threat"]["norm"] == "linf"
    assert found["seconds"] > 0
    assert any("10 samples" in line for line in found["warnings"])
    verdict = Verdict.load(place / "runs" / NAME)
    assert verdict.robust_accuracy == 0.6
    assert (place / "runs" / NAME / "report.html").is_file()


def test_eval_shows_a_table_with_intervals_doubts_and_paths(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SUBJECT, "--eps", "0.02,0.1,0.3", "--out", "here"]) == 0
    text = capsys.readouterr().out
    assert "clean accuracy" in text
    assert "90.0 %   95 % interval 55.5 % to 99.7 %" in text
    assert "0.02: 90.0 %   0.1: 60.0 %   0.3: 0.0 %" in text
    assert "broken by" in text
    assert "pgd 9" in text
    assert "doubt" in text
    assert "evidence  here\nreport    here/report.html\n" in text


def test_every_run_gets_a_folder_of_its_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = []
    for _ in range(3):
        assert run([*SUBJECT, "--eps", "0.1", "--json"]) == 0
        names.append(json.loads(capsys.readouterr().out)["out"])
    assert names == [f"runs/{NAME}", f"runs/{NAME}-2", f"runs/{NAME}-3"]


def test_a_folder_in_use_is_refused_and_left_as_it_is(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "notes.txt").write_text("keep me")
    assert run([*SUBJECT, "--eps", "0.1", "--out", "mine"]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: mine already holds something")
    assert line.count("\n") == 1
    assert [path.name for path in (place / "mine").iterdir()] == ["notes.txt"]


def test_a_stopped_run_says_how_to_go_on_and_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from robust.attacks import PGD

    once = PGD.run

    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PGD, "run", stop)
    assert run([*SUBJECT, "--eps", "0.1"]) == 130
    captured = capsys.readouterr()
    assert (
        captured.err
        == f"error: stopped; the same command with --resume --out runs/{NAME} goes on where it was\n"
    )
    monkeypatch.setattr(PGD, "run", once)
    assert run([*SUBJECT, "--eps", "0.1", "--resume", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["out"], found["robust_accuracy"]) == (f"runs/{NAME}", 0.6)


def test_another_run_is_not_resumed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SUBJECT, "--eps", "0.1", "--out", "here"]) == 0
    capsys.readouterr()
    assert run([*SUBJECT, "--eps", "0.2", "--out", "here", "--resume"]) == 2
    assert "eps" in capsys.readouterr().err


def test_without_an_argument_the_embedded_default_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["eval", "--n", "100"]) == 0
    text = capsys.readouterr().out
    assert "zoo:digits on digits: linf 0.2, suite standard, 100 samples" in text
    assert "robust eval zoo:digits-at" in text
    verdict = Verdict.load(tmp_path / "runs" / "digits-digits-linf-0.2-standard-seed0")
    assert verdict.clean_accuracy >= 0.95
    assert verdict.robust_accuracy <= 0.05
