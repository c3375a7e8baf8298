"""`robust report`: the page again, or the evidence checked, from nothing but the run folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from robust import Classifier, Linf, evaluate
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


def place_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run of `robust eval`, made in a folder of its own."""
    (tmp_path / "model.py").write_text(MODEL)
    y = np.arange(6) % 2
    x = np.full((6, 4), 0.4, np.float32)
    x[np.arange(6), y] = [0.45, 0.45, 0.45, 0.9, 0.9, 0.9]
    np.savez(tmp_path / "data.npz", x=x.reshape(6, 1, 2, 2), y=y, layout="NCHW")
    monkeypatch.chdir(tmp_path)
    arguments = [
        "eval",
        "model.py:net",
        "--data",
        "npz:data.npz",
        "--eps",
        "0.1",
        "--suite",
        "pgd",
        "--out",
        "run",
    ]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/robust", *arguments])
    assert run(arguments) == 0
    return tmp_path / "run"


def test_report_writes_the_page_again_and_the_folder_still_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place_run(tmp_path, monkeypatch)
    (folder / "report.html").write_text("lost")
    capsys.readouterr()
    assert run(["report", "run"]) == 0
    assert capsys.readouterr().out == "run/report.html\n"
    page = (folder / "report.html").read_text()
    assert "robust eval model.py:net --data npz:data.npz --eps 0.1 --suite pgd --out run" in page
    assert run(["report", "run", "--verify", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["samples"], found["examples"], found["marginal_differences"]) == (6, 3, [])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("manifest.json", lambda raw: raw.replace(b'"seed": 0', b'"seed": 1')),
        ("samples.jsonl", lambda raw: raw.replace(b'"y": 1', b'"y": 0', 1)),
        ("adversarial.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])),
        ("report.html", lambda raw: raw.replace(b"50.0", b"99.0")),
    ],
)
def test_verify_refuses_an_altered_run_with_exit_code_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    change: object,
) -> None:
    path = place_run(tmp_path, monkeypatch) / name
    before = path.read_bytes()
    path.write_bytes(change(before))  # type: ignore[operator]
    assert path.read_bytes() != before
    capsys.readouterr()
    assert run(["report", "run", "--verify"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert name in line
    assert line.count("\n") == 1


def test_other_data_is_no_ground_for_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place_run(tmp_path, monkeypatch)
    np.savez(tmp_path / "other.npz", x=np.zeros((6, 1, 2, 2), np.float32), y=np.arange(6) % 2, layout="NCHW")
    capsys.readouterr()
    assert run(["report", "run", "--data", "npz:other.npz"]) == 1
    assert "is not the one that was evaluated" in capsys.readouterr().err


def test_a_run_of_the_library_needs_model_and_data_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["script.py"])
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    evaluate(
        Classifier(module),
        torch.rand(4, 1, 2, 2),
        torch.zeros(4).long(),
        threat=Linf(0.1),
        suite="fgsm",
        out=tmp_path / "run",
    )
    assert run(["report", str(tmp_path / "run")]) == 2
    assert "give MODEL and --data" in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_a_folder_without_a_finished_run_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], folder: str
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["report", str(tmp_path / folder)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert not list((tmp_path / "empty").iterdir())
