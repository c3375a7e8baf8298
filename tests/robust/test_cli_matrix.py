"""`robust matrix`: what it prints, writes, resumes, verifies and refuses."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from robust.cli.main import run
from robust.defenses import REGISTRY, get
from tests.robust.commands import Command

SMALL = ["--n", "8", "--train", "24", "--patch-steps", "20"]
TWO = ["--suite", "quick", "--suite", "patch"]


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pytest"])


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The object that a command prints."""
    assert run([*arguments, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_matrix_goes_to_the_screen_and_into_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    defenses = ["--defense", "jpeg:quality=90+bit-depth:bits=4", "--defense", "bit-depth:bits=2"]
    command = ["matrix", "zoo:digits", "at=zoo:digits-at", *defenses, *TWO, *SMALL, "--out", "m"]
    assert run(command) == 0
    text = capsys.readouterr().out
    for part in ("quick", "patch", "worst", "+ jpeg:quality=90", "m/matrix.html", "m/matrix.svg"):
        assert part in text
    told = answer(capsys, *command, "--resume")
    names = ["digits", "digits + jpeg:quality=90 + bit-depth:bits=4", "digits + bit-depth:bits=2", "at"]
    assert [row["name"] for row in told["rows"]] == names
    assert [item["name"] for item in told["rows"][1]["defenses"]] == ["jpeg", "bit-depth"]
    assert told["columns"] == ["quick", "patch"]
    assert told["data"] | {"name": "digits", "n": 8} == told["data"]
    assert {"commit", "date", "device", "versions", "seed", "threat", "seconds"} <= set(told)
    stored = json.loads(Path("m/matrix.json").read_text())
    assert stored == {key: value for key, value in told.items() if key != "out"}
    assert run(command) == 2
    assert "--resume" in capsys.readouterr().err

    # A cell is the `robust eval` that its manifest names, and `robust report` can check it.
    row = told["rows"][1]
    cell = row["cells"]["quick"]
    _, *words = json.loads((Path("m") / cell["folder"] / "manifest.json").read_text())["command"]
    words[words.index("--out") + 1] = "single"
    single = answer(capsys, *words)
    assert (single["robust_accuracy"], single["clean_accuracy"]) == (
        cell["accuracy"],
        row["clean"]["accuracy"],
    )
    assert single["non_adaptive"] == cell["non_adaptive"]
    assert run(["report", str(Path("m") / cell["folder"]), "--verify"]) == 0
    assert "verified" in capsys.readouterr().out

    assert run([*command, "--verify"]) == 0
    assert "verified: 8 cells" in capsys.readouterr().out
    patch = Path("m") / row["cells"]["patch"]["folder"] / "patch.safetensors"
    patch.write_bytes(patch.read_bytes()[:-1] + b"\0")
    assert run([*command, "--verify"]) == 1
    assert "was altered" in capsys.readouterr().err


def test_without_arguments_it_takes_the_shipped_models_and_the_usual_columns() -> None:
    from robust.cli import matrix
    from robust.matrix import COLUMNS

    assert matrix.DEFAULT_SUITES == COLUMNS == ("quick", "standard", "patch", "transfer")
    assert matrix.DEFAULT_MODELS == ("zoo:digits", "zoo:digits-at")


def test_all_defenses_are_a_row_each(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(
        capsys, "matrix", "zoo:digits", "--defense", "all", "--suite", "fgsm", "--n", "2", "--out", "m"
    )
    transforms = [name for name in REGISTRY if get(name).kind == "transform"]
    assert [row["name"] for row in told["rows"]] == ["digits", *(f"digits + {name}" for name in transforms)]


def test_a_killed_matrix_goes_on_and_repeats_no_finished_cell(tmp_path: Path) -> None:
    command = [
        "matrix",
        "zoo:digits",
        "zoo:digits-at",
        "--suite",
        "fgsm",
        "--suite",
        "quick",
        "--suite",
        "pgd",
    ]
    command += ["--n", "8", "--out", str(tmp_path / "m"), "--json"]
    running = Command(tmp_path / "said", *command, OMP_NUM_THREADS="1")
    first = tmp_path / "m" / "cells" / "digits" / "fgsm" / "digests.json"
    deadline = time.monotonic() + 120
    while not first.exists() and running.process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    held = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("digests.json")}
    assert first in held
    again = Command(tmp_path / "again", *command, "--resume", OMP_NUM_THREADS="1")
    assert again.end() == 0, (tmp_path / "again").read_text()
    assert {path: path.stat().st_mtime_ns for path in held} == held
    assert [len(row["cells"]) for row in again.json()["rows"]] == [3, 3]


def test_patches_are_learnt_on_at_most_half_of_scarce_data(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer(
        capsys, "matrix", "zoo:digits", "--suite", "patch", "--n", "20", "--train", "3000", "--patch-steps", "2"
    )  # fmt: skip
    cell = told["rows"][0]["cells"]["patch"]
    assert told["data"]["n"] == 20
    assert cell["learnt_on"] > 20
    assert cell["parameters"]["steps"] == 2
    assert told["out"].startswith("runs/matrix-digits-digits-linf-0.2")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["zoo:digits", "zoo:digits"], "two rows are called digits"),
        (["--defense", "jpeg", "--defense", "jpeg"], "two rows are called digits + jpeg"),
        (["--defense", "jpgg"], "did you mean jpeg"),
        (["--defense", "jpeg+bit-dept"], "did you mean bit-depth"),
        (["--defense", "bit-depth:bits=40"], "bits"),
        (["--suite", "quik"], "did you mean quick"),
        (["--suite", "quick", "--suite", "quick"], "quick is given twice"),
        (["--suite", "quick", "--surrogate", "zoo:digits-at"], "no column uses any"),
        (["--eps", "0.1,0.2"], "one radius"),
        (["--train", "0"], "at least 1"),
        (["--size", "2"], "no share of the area"),
        (["--size", "0.001", "--suite", "patch"], "pixels has none"),
        (["--patch-steps", "0"], "at least 1"),
        (["zoo:digits@none.safetensors"], "do not exist"),
        (["zoo:dgits", "--data", "digits"], "did you mean"),
        (["onnx:none.onnx", "--data", "digits"], "none.onnx"),
        (["--data", "digits", "--n", "0"], "at least 1"),
        (["--precision", "half"], "precision"),
        (["--verify"], "no matrix's folder"),
        (["--norm", "l0", "--suite", "standard"], "no l0 form"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_writes_nothing(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["matrix", *arguments, *(["--n", "8"] if "--n" not in arguments else []), "--out", "m"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not Path("m").exists()
