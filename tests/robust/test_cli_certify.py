"""`robust certify`: what it prints, keeps, resumes and refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from robust.certify import certified_accuracy, load_certificate
from robust.cli.main import run
from robust.digest import file_digest

SHORT = ["zoo:digits", "--samples", "12", "--n", "200", "--n0", "20"]


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object that a command prints."""
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_says_who_voted_and_every_sample_s_counts_give_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    told = answer(["certify", *SHORT, "--radius", "0.05,0.2", "--out", str(out)], capsys)
    stored, records = load_certificate(out)
    assert {**stored, "out": str(out)} == told
    assert told["voters"] == ["float32, its folded twin"]
    assert told["certificate"]["confidence"] == 0.999
    assert told["certificate"]["settings"]["n"] == told["mean_votes"] == 200
    assert [row["radius"] for row in told["certified_accuracy"]] == [0.0, 0.05, 0.2]
    assert [record["index"] for record in records] == list(range(12))
    for record in records:
        k = record["votes"].get(str(record["chosen"]), 0)
        lower = stats.binomtest(k, 200, alternative="greater").proportion_ci(0.999).low
        radius = max(0.25 * stats.norm.ppf(lower), 0.0)
        assert record["radius"] == pytest.approx(radius, abs=1e-9)
    for row in told["certified_accuracy"]:
        assert row["accuracy"] == certified_accuracy(records, row["radius"])
    figure = (out / "certificate.svg").read_text()
    assert "certified (smoothing)" in figure
    digests = json.loads((out / "digests.json").read_text())
    assert set(digests) == {"samples.jsonl", "certificate.json", "certificate.svg"}
    assert all(file_digest(out / name) == digest for name, digest in digests.items())
    assert run(["certify", *SHORT, "--radius", "0.05,0.2", "--out", str(out)]) == 2
    assert "already holds something; add --resume" in capsys.readouterr().err
    again = answer(["certify", *SHORT, "--radius", "0.05,0.2", "--out", str(out), "--resume"], capsys)
    assert again["certified_accuracy"] == told["certified_accuracy"]
    assert (
        run(["certify", *SHORT, "--sigma", "0.5", "--radius", "0.05,0.2", "--out", str(out), "--resume"]) == 2
    )
    line = capsys.readouterr().err
    assert "the run to resume has certificate=" in line
    assert line.count("\n") == 1


def test_sequential_decides_the_same_radii_with_fewer_votes(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["certify", "zoo:digits", "--samples", "12", "--n", "2000", "--radius", "0.05,0.1"]
    fixed, sequential = answer(command, capsys), answer([*command, "--sequential"], capsys)
    assert sequential["mean_votes"] < 0.6 * fixed["mean_votes"]
    for ours, theirs in zip(sequential["certified_accuracy"], fixed["certified_accuracy"], strict=True):
        assert abs(ours["accuracy"] - theirs["accuracy"]) <= 1 / 12 + 1e-9
    assert sequential["certificate"]["settings"]["sequential"] is True


def test_a_killed_run_goes_on_and_counts_nothing_twice(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "robust",
        "certify",
        "zoo:digits",
        "--samples",
        "24",
        "--n",
        "150",
        "--json",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = subprocess.Popen(
        [*command, "--out", str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal = killed / "samples.jsonl"
    for _ in range(3000):
        if (journal.exists() and journal.stat().st_size) or process.poll() is not None:
            break
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    if journal.exists() and not (killed / "certificate.json").exists():
        with journal.open("ab") as stream:  # a torn line
            stream.write(b'{"index": 23, "class"')
    assert run([*command[3:], "--out", str(killed), "--resume"]) == 0
    assert run([*command[3:], "--out", str(whole)]) == 0
    assert load_certificate(killed)[1] == load_certificate(whole)[1]
    assert len(load_certificate(killed)[1]) == 24


def test_bounds_stand_beside_the_verdict_of_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict, out = tmp_path / "v", tmp_path / "c"
    evaluated = [
        "eval",
        "zoo:digits-at",
        "--n",
        "2",
        "--suite",
        "fgsm",
        "--eps",
        "0.0005,0.02",
        "--out",
        str(verdict),
    ]
    empirical = answer(evaluated, capsys)
    command = ["certify", "zoo:digits-at", "--samples", "2", "--method", "ibp", "--eps", "0.0005,0.02"]
    told = answer([*command, "--verdict", str(verdict), "--out", str(out)], capsys)
    assert told["contradicted"] == []
    assert told["certified_accuracy"][1]["accuracy"] > 0
    for row, (_, accuracy) in zip(told["certified_accuracy"], told["verdict"]["curve"], strict=True):
        assert row["accuracy"] <= accuracy
    assert told["clean_accuracy"] == empirical["clean_accuracy"]
    assert "not broken by" in (out / "certificate.svg").read_text()
    for wrong, line in (
        (["--method", "crown", "--norm", "l2", "--eps", "0.1"], "the verdict is about linf"),
        (["--samples", "3"], "about other samples"),
    ):
        assert run([*command, *wrong, "--verdict", str(verdict), "--out", str(tmp_path / "x")]) == 2
        assert line in capsys.readouterr().err
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--method", "smothing"], "did you mean smoothing"),
        (["--sigma", "0"], "--sigma: 0 is no noise"),
        (["--sigma", "x"], "--sigma"),
        (["--n", "0"], "--n: 0 votes"),
        (["--n0", "0"], "--n0: 0 votes"),
        (["--alpha", "1"], "--alpha: 1 is no chance"),
        (["--radius", "-1"], "positive radius"),
        (["--radius", "inf"], "unbounded"),
        (["--noise", "gausian"], "did you mean gaussian"),
        (["--samples", "0"], "--samples: 0"),
        (["--eps", "0.1"], "--eps: smoothing does not take it"),
        (["--norm", "l2"], "--norm: smoothing does not take it"),
        (["--method", "ibp", "--sigma", "0.5"], "--sigma: ibp does not take it"),
        (["--method", "crown", "--sequential"], "--sequential: crown does not take it"),
        (["--method", "ibp", "--norm", "l2"], "ibp has no l2 form"),
        (["--precision", "float16"], "float16"),
        (["--verdict", "nowhere"], "nowhere is no run folder"),
        (["--device", "cuda:99"], "cuda"),
    ],
)
def test_what_cannot_be_certified_is_one_line_and_writes_nothing(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c"
    assert run(["certify", "--samples", "2", "--out", str(out), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not out.exists()
