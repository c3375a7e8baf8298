"""`robust privacy epsilon`: a table with its assumptions, one JSON object, calibration, and one line on bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from robust.cli.main import run
from robust.defenses.privacy import Ledger, Mechanism

pytest.importorskip("dp_accounting", reason="accountants need the extra `privacy`")
pytest.importorskip("opacus", reason="the accountant prv needs the extra `privacy`")

SETTING = ("--noise-multiplier", "1", "--sample-rate", "0.01", "--steps", "1000")


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    """The JSON object of a command that succeeds."""
    assert run(["privacy", "epsilon", *arguments, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_table_has_every_accountant_and_the_assumptions_in_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["privacy", "epsilon", *SETTING]) == 0
    text = capsys.readouterr().out
    for words in ("pld            1.828", "prv            1.838", "rdp            2.101", "approximation"):
        assert words in text
    for words in (
        "by a coin of its own",
        "one record added or removed",
        "every run and restart",
        "stays secret",
    ):
        assert words in text
    assert text.count("one record added or removed") == 1


def test_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, *SETTING, "--sampling", "fixed")
    rows = {row["accountant"]: row["epsilon"] for row in found["epsilons"]}
    assert rows["rdp"] == pytest.approx(3.576, rel=0.005)
    assert set(found["refused"]) == {"pld", "prv"}
    none = answer(
        capsys, "--noise-multiplier", "0", "--sample-rate", "0.1", "--steps", "1", "--accountant", "rdp"
    )
    assert none["epsilons"][0]["epsilon"] is None
    quiet = answer(capsys, "--noise-multiplier", "inf", *SETTING[2:], "--accountant", "rdp")
    assert quiet["noise_multiplier"] == "inf"
    assert quiet["epsilons"][0]["epsilon"] == 0


@pytest.mark.parametrize("missing", ["--noise-multiplier", "--sample-rate", "--steps"])
def test_a_budget_finds_what_is_left_out(capsys: pytest.CaptureFixture[str], missing: str) -> None:
    at = SETTING.index(missing)
    rest = (*SETTING[:at], *SETTING[at + 2 :])
    found = answer(capsys, *rest, "--target-epsilon", "3", "--accountant", "rdp")
    assert found["solved"] == missing[2:].replace("-", "_")
    assert found["epsilons"][0]["epsilon"] <= 3
    assert found[found["solved"]] == found["value"]
    assert run(["privacy", "epsilon", *rest, "--target-epsilon", "3", "--accountant", "rdp"]) == 0
    assert "keeps epsilon 3 by rdp" in capsys.readouterr().out


def test_phases_and_a_ledger_compose(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        for _ in range(20):
            ledger.book(Mechanism(noise_multiplier=1.0, sample_rate=0.01))

    def value(*arguments: str) -> float:
        return float(answer(capsys, *arguments, "--accountant", "rdp")["epsilons"][0]["epsilon"])

    phase = ("--phase", "1.0:1/100:980")
    assert value("--ledger", str(path), *phase) == pytest.approx(value(*SETTING), rel=1e-12)
    assert value("--ledger", str(path)) < value(*phase) < value(*phase, "--phase", "2:1/100:10")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "--noise-multiplier, --sample-rate, --steps: missing"),
        (SETTING[:4], "--steps: missing"),
        ((*SETTING, "--delta", "2"), "delta=2"),
        ((*SETTING, "--sampling", "poison"), "did you mean poisson"),
        ((*SETTING, "--accountant", "pdl"), "did you mean pld"),
        ((*SETTING, "--sampling", "fixed", "--accountant", "pld"), "cannot serve fixed batches"),
        ((*SETTING, "--target-epsilon", "3"), "finds one of"),
        ((*SETTING[:4], "--target-epsilon", "-3"), "a budget of epsilon -3"),
        ((*SETTING[:4], "--target-epsilon", "3", "--accountant", "gdp"), "may understate"),
        (("--phase", "1:2"), "is no phase"),
        (("--phase", "1:x:3"), "--phase: 'x' is not a number"),
        (("--ledger", "no-such-file"), "no-such-file: cannot be read"),
        (("--noise-multiplier", "one"), "--noise-multiplier: 'one' is not a number"),
        ((*SETTING[:4], "--steps", "-5"), "-5 is no number of steps"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], line: str
) -> None:
    assert run(["privacy", "epsilon", *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1


def test_the_group_names_its_commands_and_answers_typos(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["privacy"]) == 0
    assert "epsilon" in capsys.readouterr().out
    assert run(["privacy", "epsilonn"]) == 2
    assert "did you mean epsilon" in capsys.readouterr().err


def test_accountants_are_listed_with_what_they_serve(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "accountants", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["pld"]["sampling"] == ["poisson", "shuffled"]
    assert rows["gdp"]["number"] == "approximation"
    assert all(row["paper"] for row in rows.values())
