"""`robust transfer`, `robust eval --surrogate` and `robust attack surrogate`: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from robust.cli.main import run
from robust.errors import ConfigError, ModelError
from robust.models.named import parse_model

PAIR = ["--model", "zoo:digits", "--model", "at=zoo:digits-at"]


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The object that a command prints."""
    assert run([*arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_matrix_goes_to_the_screen_and_into_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t"
    command = ["transfer", *PAIR, "--attack", "bim", "--attack", "mifgsm", "--n", "12", "--steps", "3"]
    told = answer([*command, "--out", str(out)], capsys)
    assert [model["name"] for model in told["models"]] == ["digits", "at"]
    assert len(told["cells"]) == 2 * 2 * 2
    assert told["attacks"]["mifgsm"]["steps"] == 3
    assert json.loads((out / "transfer.json").read_text()) == told
    assert (out / "transfer.svg").read_text().startswith("<?xml")
    assert run([*command, "--out", str(out)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert run([*command, "--source", "at"]) == 0
    text = capsys.readouterr().out
    assert "both classify correctly" in text
    assert "against bim" in text
    fused = answer(
        [*command, "--model", "third=zoo:digits", "--source", "at", "--ensemble", "logits"], capsys
    )
    assert fused["sources"] == ["at", "others"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "two or more"),
        (["--model", "zoo:digits"], "two or more"),
        (["--model", "zoo:digits", "--model", "zoo:digits"], "two are called digits; name them"),
        ([*PAIR, "--attack", "square"], "square cannot be transferred"),
        ([*PAIR, "--attack", "pgd", "--attack", "pgd"], "pgd is given twice"),
        ([*PAIR, "--attack", "mifgms"], "did you mean mifgsm"),
        ([*PAIR, "--attack", "tifgsm", "--norm", "l1"], "no l1 form"),
        ([*PAIR, "--eps", "0.1,0.2"], "one radius"),
        ([*PAIR, "--source", "dgits"], "did you mean digits"),
        ([*PAIR, "--ensemble", "logits"], "at least 3"),
        ([*PAIR, "--ensemble", "logit"], "did you mean logits"),
        ([*PAIR, "--steps", "0"], "at least 1"),
        ([*PAIR, "--model", "zoo:digits@missing.safetensors"], "missing.safetensors do not exist"),
        ([*PAIR, "--model", "c=zoo:digits@mean=a"], "mean"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_writes_nothing(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["transfer", *arguments, "--n", "4", "--out", str(tmp_path / "t")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "t").exists()


def test_a_model_is_written_with_its_weights_normalisation_and_name(tmp_path: Path) -> None:
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"")
    found = parse_model(f"big=zoo:resnet20@{weights}@mean=0.5,1/2,0.25@std=0.2")
    assert (found.name, found.spec, found.weights) == ("big", "zoo:resnet20", weights)
    assert (found.mean, found.std) == ((0.5, 0.5, 0.25), (0.2,))
    assert parse_model("zoo:resnet20").name == "resnet20"
    assert parse_model("models/net.py:make").name == "make"
    for text in ("", "a=", "@w", "zoo:digits@mean=1@what=2", f"zoo:digits@{weights}@{weights}"):
        with pytest.raises((ConfigError, ModelError)):
            parse_model(text)


def test_eval_takes_surrogates_and_refuses_them_where_nothing_uses_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = answer(
        ["eval", "zoo:digits", "--suite", "transfer", "--surrogate", "zoo:digits-at", "--n", "12",
         "--out", str(tmp_path / "a")],
        capsys,
    )  # fmt: skip
    assert told["suite"] == "transfer"
    assert told["robust_accuracy"] < 1
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert [model["name"] for model in manifest["surrogates"]] == ["digits-at"]
    for suite, line in (("quick", "suite quick uses none"), ("transfer", "unknown zoo model")):
        out = tmp_path / suite
        spec = "zoo:digits-at" if suite == "quick" else "zoo:digits-ta"
        assert run(["eval", "zoo:digits", "--suite", suite, "--surrogate", spec, "--out", str(out)]) == 2
        assert line in capsys.readouterr().err
        assert not out.exists()


def test_attack_distils_its_substitute_once_for_all_chunks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("robust.cli.attack.CHUNK", 5)
    settings = ["--set", "queries=60", "--set", "inner=bim", "--set", "epochs=3"]
    told = answer(["attack", "surrogate", "zoo:digits", "--n", "12", *settings], capsys)
    assert told["cost"]["queries"] == 60 + 2 * 12
    assert told["curve"] is not None
    given = ["--set", "inner=bim", "--set", 'models=["zoo:digits"]']
    white = answer(["attack", "surrogate", "zoo:digits", "--n", "12", *given], capsys)
    assert white["cost"]["queries"] == 2 * 12
    assert white["success_rate"] > 0.9
