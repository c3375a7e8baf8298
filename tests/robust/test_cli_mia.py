"""`robust privacy mia`: what it prints, keeps, resumes after a kill, and refuses."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from robust.cli.main import run
from robust.cli.privacy_mia import member_mask
from robust.digest import file_digest
from robust.errors import ConfigError
from robust.membership_scores import measure
from tests.robust.commands import Command

SHORT = ["privacy", "mia", "--n", "80", "--epochs", "3", "--shadow", "2"]
ATTACKS = ["--attack", "loss,lira-online,label-only-gap", "--attack", "rmia:references=2,gamma=1.5"]


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object that a command prints."""
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_run_trains_its_target_and_keeps_what_gives_its_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    told = answer([*SHORT, *ATTACKS, "--out", str(out)], capsys)
    stored = json.loads((out / "membership.json").read_text())
    assert {"n": 80, **stored, "out": str(out)} == told
    assert [row["name"] for row in told["attacks"]] == [
        *("loss", "lira-online", "label-only-gap"),
        "rmia references=2 gamma=1.5",
    ]
    assert told["target"]["trained_here"]
    assert told["samples"] == {"n": 80, "members": 40, "others": 40}
    assert len(list((out / "models").glob("model-*"))) == 3
    [part] = (out / "scores").glob("loss-*")
    from robust.membership import halves
    from robust.rng import derive

    mask = halves(80, 1, derive(0, "membership/target"))[0]
    measured = measure(load_file(part)["scores"], mask)
    assert {key: told["attacks"][0][key] for key in measured} == json.loads(json.dumps(measured))
    digests = json.loads((out / "digests.json").read_text())
    assert set(digests) == {"membership.json", "roc.svg", "report.html", "plan.json"}
    assert all(file_digest(out / name) == digest for name, digest in digests.items())
    page = (out / "report.html").read_text()
    assert "rmia references=2 gamma=1.5" in page
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


def test_attacks_are_added_to_a_run_and_nothing_is_trained_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m"
    first = answer([*SHORT, "--attack", "loss", "--out", str(out)], capsys)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "models").glob("model-*")}
    more = answer([*SHORT, "--attack", "loss,lira-offline", "--out", str(out), "--resume"], capsys)
    assert {path: path.stat().st_mtime_ns for path in (out / "models").glob("model-*")} == stamps
    assert more["attacks"][0] == first["attacks"][0]
    assert run([*SHORT, "--attack", "loss", "--out", str(out)]) == 2
    assert "already holds something; add --resume" in capsys.readouterr().err
    assert run([*SHORT, "--attack", "loss", "--out", str(out), "--resume", "--seed", "1"]) == 2
    assert "the run to resume has" in capsys.readouterr().err


def test_a_run_that_is_killed_goes_on_to_the_same_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*SHORT[:-1], "4", "--epochs", "12", "--attack", "loss,lira-online"]
    models = tmp_path / "m" / "models"
    killed = Command(tmp_path / "said", *command, "--out", str(tmp_path / "m"))
    for _ in range(6000):
        if len(list(models.glob("model-*"))) >= 2 or not killed.process.is_alive():
            break
        time.sleep(0.01)
    killed.kill()
    before = {path: path.stat().st_mtime_ns for path in models.glob("model-*")}
    assert 2 <= len(before) <= 5
    resumed = answer([*command, "--out", str(tmp_path / "m"), "--resume"], capsys)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert resumed["attacks"] == answer(command, capsys)["attacks"]


def test_a_given_model_is_measured_on_the_rows_it_was_trained_on(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["privacy", "mia", "zoo:digits", "--n", "200", "--attack", "loss,entropy,label-only-gap"]
    told = answer([*command, "--members", "train"], capsys)
    assert not told["target"]["trained_here"]
    assert told["references"] == {"count": 0}
    assert told["samples"] == {"n": 200, "members": 100, "others": 100}
    assert any("the parts differ in kind" in line for line in told["warnings"])
    assert run([*command, "--members", "0:50,60"]) == 0
    text = capsys.readouterr().out
    assert "51 members, 149 others" in text
    assert "as given" in text
    labels = answer([*command[:-1], "label-only-gap", "--members", "0:50", "--answers", "labels"], capsys)
    assert labels["target"]["sees"] == "labels"


def test_members_are_rows_ranges_or_a_file_of_them(tmp_path: Path) -> None:
    assert member_mask("0:3,7", 10).nonzero()[:, 0].tolist() == [0, 1, 2, 7]
    (tmp_path / "rows").write_text("# those\n1 2\n5:7, 9\n")
    assert member_mask(str(tmp_path / "rows"), 10).nonzero()[:, 0].tolist() == [1, 2, 5, 6, 9]
    for text in ("8:11", "10", "3:3"):
        with pytest.raises(ConfigError, match="is not among the 10 samples"):
            member_mask(text, 10)
    (tmp_path / "rows").write_text("1\nx\n")
    with pytest.raises(ConfigError, match="'x' is no row"):
        member_mask(str(tmp_path / "rows"), 10)
    assert member_mask("0", 1).dtype == torch.bool


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--attack", "lra-online"], "did you mean lira-online"),
        (["--attack", "rmia:gama=2"], "did you mean 'gamma'"),
        (["--attack", "rmia:gamma=0.1"], "gamma is at least 1"),
        (
            ["--attack", "rmia:references=4"],
            "rmia references=4 needs 4 reference models or more, and there are 2",
        ),
        (["--attack", "loss,loss"], "loss is given twice"),
        (["--shadow", "3"], "--shadow: 3 reference models make no pairs"),
        (["--shadow", "0"], "needs 2 reference models or more, and there are 0"),
        (["--members", "nowhere"], "neither rows such as 0:500,700, nor a file of them, nor train"),
        (["--members", "0:80"], "80 of 80 samples are members"),
        (["--members", "0:81"], "is not among the 80 samples"),
        (["--epochs", "0"], "epochs=0"),
        (["--set", "epoch=1"], "did you mean epochs"),
        (["--set", "seed=1"], "--seed"),
        (["--set", "ema=0.9"], "ema=0.9 is for robust.fit"),
        (["--set", "crop=-1"], "crop=-1"),
        (["--n", "0"], "--n: 0"),
        (["--reference-model", "onnx:x.onnx"], "cannot be trained anew"),
        (["--data", "digts"], "digts"),
        (["--device", "cuda:99"], "cuda"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attack = [] if "--attack" in arguments else ["--attack", "loss,lira-online"]
    assert run([*SHORT, *attack, *arguments, "--out", str(tmp_path / "m")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "m").exists()


def test_weights_without_members_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w.safetensors").touch()
    assert run(["privacy", "mia", "zoo:digits", "--weights", str(tmp_path / "w.safetensors")]) == 2
    assert "--members is missing: say which samples zoo:digits was trained on" in capsys.readouterr().err
