"""`robust privacy invert`: what it prints, keeps, resumes after a kill, and refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from robust.cli.main import run
from robust.digest import file_digest
from tests.robust.commands import Command

COMMAND = ["privacy", "invert", "zoo:digits", "--n", "2", "--held-out", "40"]
SHORT = ["--attack", "inverting-gradients:steps=4"]


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object that a command prints."""
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_keeps_what_it_tells_and_takes_further_attacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "i"
    command = [*COMMAND, *SHORT, "--dp-noise", "0.1", "--compress", "keep=0.5", "--out", str(out)]
    told = answer(command, capsys)
    stored = json.loads((out / "inversion.json").read_text())
    assert {"n": 2, **stored, "out": str(out)} == told
    assert told["protocol"] == {
        "batch": 1, "clip": 1.0, "noise": 0.1, "keep": 0.5, "bits": None, "steps": 1, "lr": 0.1,
    }  # fmt: skip
    row = told["attacks"][0]
    assert row["name"] == "inverting-gradients steps=4"
    assert len(row["samples"]) == 2
    assert row["gain"] == pytest.approx(row["psnr"] - row["guess_psnr"])
    digests = json.loads((out / "digests.json").read_text())
    assert set(digests) == {"inversion.json", "report.html", "plan.json"}
    assert all(file_digest(out / name) == digest for name, digest in digests.items())
    page = (out / "report.html").read_text()
    assert page.count("recovered</figcaption>") == 2
    assert "with noise of 0.1 of the clip, the largest 50.0" in page
    assert "http" not in page
    stamps = {path: path.stat().st_mtime_ns for path in (out / "recovered").iterdir()}
    more = answer([*command, "--attack", "model-inversion:steps=3", "--resume"], capsys)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    assert more["attacks"][0] == row
    assert more["attacks"][1]["sees"] == "confidences"
    assert run(command) == 2
    assert "already holds something; add --resume" in capsys.readouterr().err
    assert run([*command, "--resume", "--seed", "1"]) == 2
    assert "the run to resume has" in capsys.readouterr().err


def test_a_run_that_is_killed_goes_on_to_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*COMMAND[:-3], "4", "--held-out", "40", "--attack", "inverting-gradients:steps=30"]
    parts = tmp_path / "i" / "recovered"
    killed = Command(tmp_path / "said", *command, "--out", str(tmp_path / "i"))
    for _ in range(6000):
        if len(list(parts.glob("*.safetensors"))) >= 1 or not killed.process.is_alive():
            break
        time.sleep(0.01)
    killed.kill()
    before = {path: path.stat().st_mtime_ns for path in parts.glob("*.safetensors")}
    assert 1 <= len(before) <= 4
    resumed = answer([*command, "--out", str(tmp_path / "i"), "--resume"], capsys)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    fresh = answer(command, capsys)
    for name in ("psnr", "ssim", "samples", "curve"):
        assert resumed["attacks"][0][name] == fresh["attacks"][0][name]


def test_batches_known_labels_and_first_weights(capsys: pytest.CaptureFixture[str]) -> None:
    told = answer([*COMMAND, *SHORT, "--batch", "2", "--known-labels", "--untrained"], capsys)
    assert told["protocol"]["batch"] == 2
    assert told["attacks"][0]["labels_right"] == 1
    text = " ".join(told["warnings"])
    assert all(line in text for line in ("untrained", "given the labels", "matched with the truth's help"))
    trained = answer([*COMMAND, *SHORT], capsys)
    assert trained["model"]["digest"] != told["model"]["digest"]
    assert run([*COMMAND, *SHORT]) == 0
    shown = capsys.readouterr().out
    assert "observed: the gradient of one sample" in shown
    assert "other samples" in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--attack", "invertig-gradients"], "did you mean inverting-gradients"),
        (["--attack", "loss"], "unknown inversion attack 'loss'"),
        (["--attack", "dlg:step=3"], "did you mean 'steps'"),
        (["--attack", "dlg:steps=0"], "dlg: steps=0"),
        (["--attack", "dlg,dlg"], "dlg is given twice"),
        (["--attack", "analytic-fc"], "analytic-fc needs a model whose first layer is linear"),
        (["--batch", "3"], "--batch: 2 samples make no whole batches of 3"),
        (["--batch", "0"], "batch=0"),
        (["--dp-noise", "much"], "--dp-noise"),
        (["--dp-noise", "-1"], "noise=-1"),
        (["--dp-clip", "0"], "clip=0.0 bounds nothing"),
        (["--compress", "kep=0.1"], "did you mean keep"),
        (["--compress", "bits=5"], "bits=5"),
        (["--compress", "keep=some"], "keep=some"),
        (["--held-out", "0"], "--held-out: 0"),
        (["--n", "0"], "--n: 0"),
        (["--data", "digts"], "digts"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = [] if "--attack" in arguments else SHORT
    assert run([*COMMAND, *attack, *arguments, "--out", str(tmp_path / "i")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "i" / "inversion.json").exists()


def test_a_model_that_gives_answers_only_has_no_gradient_to_observe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["privacy", "invert", "onnx:x.onnx", "--data", "digits"]) == 2
    assert "gives answers only; an observer of gradients has the model itself" in capsys.readouterr().err
