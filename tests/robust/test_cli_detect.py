"""`robust detect`: what it prints, keeps, resumes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from robust import load_model
from robust.cli.main import run
from robust.detector import load_detector
from robust.digest import file_digest
from robust.roc import roc

SHORT = ["detect", "zoo:digits", "--n", "12", "--held-out", "60", "--learn", "80"]
QUICK = ["--attack", "pgd:steps=5", "--attack", "detector-aware:steps=8,restarts=1"]
DETECTORS = ["--detector", "magnet-error:epochs=2", "--detector", "feature-squeezing:bits=2,search=0"]


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object that a command prints."""
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_keeps_scores_that_give_its_table_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "d"
    told = answer([*SHORT, *QUICK, *DETECTORS, "--out", str(out)], capsys)
    stored = json.loads((out / "detection.json").read_text())
    assert {**stored, "out": str(out)} == told
    assert told["threat"] == {"norm": "linf", "eps": 0.2}
    assert [row["name"] for row in told["detectors"]] == ["magnet-error", "feature-squeezing"]
    clf = load_model("zoo:digits")
    for row in told["detectors"]:
        clean = load_file(out / "scores" / f"{row['name']}--clean.safetensors")["scores"]
        fitted = load_detector(out / "detectors" / row["name"], clf)
        assert row["clean_flagged"]["count"] == int((clean > fitted.threshold).sum())
        for attack, cell in row["attacks"].items():
            points = load_file(
                out / "points" / f"{row['name']}--{attack}-00000.safetensors"
                if attack == "detector-aware"
                else out / "points" / f"{attack}-00000.safetensors"
            )
            scores = load_file(out / "scores" / f"{row['name']}--{attack}.safetensors")["scores"]
            assert torch.allclose(scores, fitted.score(points["x_adv"]), atol=1e-5)
            wrong = points["wrong"]
            assert cell["broken"] == int(wrong.sum())
            assert cell["success"]["count"] == int((wrong & (scores <= fitted.threshold)).sum())
            if cell["broken"]:
                assert cell["auc"] == pytest.approx(roc(clean.numpy(), scores[wrong].numpy()).auc)
    digests = json.loads((out / "digests.json").read_text())
    assert set(digests) == {"detection.json", "roc.svg", "plan.json"}
    assert all(file_digest(out / name) == digest for name, digest in digests.items())
    assert "area under the curve" in (out / "roc.svg").read_text()
    assert run([*SHORT, *QUICK, *DETECTORS, "--out", str(out)]) == 2
    assert "already holds something; add --resume" in capsys.readouterr().err
    # What is kept is not made again: a mark left in the points is still there, and shows in the resumed table.
    mark = out / "points" / "pgd-00000.safetensors"
    points = load_file(mark)
    save_file({**points, "wrong": torch.zeros_like(points["wrong"])}, mark)
    again = answer([*SHORT, *QUICK, *DETECTORS, "--out", str(out), "--resume"], capsys)
    assert [row["attacks"]["pgd"]["broken"] for row in again["detectors"]] == [0, 0]
    assert [row["attacks"]["detector-aware"] for row in again["detectors"]] == [
        row["attacks"]["detector-aware"] for row in told["detectors"]
    ]
    assert run([*SHORT, *QUICK, "--eps", "0.1", "--out", str(out), "--resume"]) == 2
    line = capsys.readouterr().err
    assert "the run to resume has threat=" in line
    assert run([*SHORT, "--attack", "pgd:steps=6", "--out", str(out), "--resume"]) == 2
    line = line + capsys.readouterr().err
    assert "the attack pgd={'steps': 5}" in line
    assert line.count("\n") == 2


def test_the_table_says_who_falls(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*SHORT, *QUICK, *DETECTORS[:2]]) == 0
    text = capsys.readouterr().out
    for part in (
        "AUC (95 %)",
        "TPR 1, 5 %",
        "past it",
        "pgd",
        "detector-aware",
        "who knows it",
        "asked for 5 %",
    ):
        assert part in text
    assert run([*SHORT, "--attack", "pgd:steps=2", *DETECTORS[:2]]) == 0
    assert "was not attacked by anybody who knows it" in capsys.readouterr().out


def test_similarity_meets_queries_plain_and_blinded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SHORT, "--detector", "similarity:epochs=2,neighbours=5", "--fpr", "0.05"]
    command += ["--accounts", "2", "--queries", "50", "--out", str(tmp_path / "q")]
    told = answer(command, capsys)
    [row] = told["detectors"]
    assert set(row["attacks"]) == {
        *("square", "square, blinded", "nes", "nes, blinded", "hopskipjump", "hopskipjump, blinded")
    }
    for cell in row["attacks"].values():
        assert cell["n"] == 2
        assert cell["mean_queries"] <= 51
    assert row["attacks"]["square"]["detected"]["count"] == 2
    assert row["attacks"]["square"]["first_detection"] <= 40
    assert row["clean_flagged"]["of"] == 12
    assert row["attacked_by"] == "query blinding"
    assert run([*command, "--resume"]) == 0
    text = capsys.readouterr().out
    assert "first" in text
    assert "square, blinded" in text


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--detector", "mahalanobs"], "did you mean mahalanobis"),
        (["--detector", "jpeg"], "unknown detector 'jpeg'"),
        (["--detector", "lid:neighbour=3"], "did you mean 'neighbours'"),
        (["--detector", "region:radius=-1"], "radius=-1"),
        (["--detector", "region:radius"], "is not KEY=VALUE; write it like lid:neighbours=10"),
        (["--attack", "pdg"], "did you mean pgd"),
        (["--attack", "square"], "square is no white-box attack"),
        (["--attack", "pgd,pgd"], "pgd is given twice"),
        (["--attack", "pgd:step=3"], "did you mean 'steps'"),
        (["--attack", "detector-aware:detector=lid"], "detector"),
        (["--norm", "l2", "--attack", "fgsm"], "fgsm has no l2 form"),
        (["--fpr", "0"], "--fpr: 0 is no false-positive rate"),
        (["--fpr", "x"], "--fpr"),
        (
            ["--fpr", "0.001"],
            "held-out images cannot bound a false-positive rate of 0.001; give at least 999",
        ),
        (["--detector", "magnet-error,similarity"], "similarity: 60 held-out images"),
        (["--n", "0"], "--n: 0"),
        (["--n", "499"], "--n 499 leaves none to set thresholds"),
        (["--learn", "0"], "--learn: 0"),
        (["--held-out", "0"], "--held-out: 0"),
        (["--queries", "0"], "--queries: 0"),
        (["--eps", "0.1,0.2"], "--eps: detectors are measured at one radius"),
        (["--learn-data", "nowhere"], "nowhere"),
        (["--detector", "feature-squeezing:search=17"], "search=17 reaches beyond images of 8×8"),
        (["--device", "cuda:99"], "cuda"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*SHORT, *([] if "--attack" in arguments else ["--attack", "pgd:steps=2"]), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1


def test_an_oracle_has_no_inside_to_look_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["detect", "http://127.0.0.1:1", "--data", "digits"]) == 2
    assert "robust detect needs the model itself" in capsys.readouterr().err
