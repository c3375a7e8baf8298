"""The membership experiment: it runs and goes on, the page says what the record says, and the claims hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robust.digest import read_json
from robust.experiments.privacy import membership, membership_page

pytest.importorskip("dp_accounting", reason="calibration needs the extra `privacy`")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What was recorded."""
    if not membership_page.RECORD.exists():
        pytest.skip("no record of membership yet: experiments/privacy/README.md tells how it is made")
    return read_json(membership_page.RECORD)


def test_the_experiment_runs_goes_on_and_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(60) % 10)
    command = [str(tmp_path / "run"), str(tmp_path / "record.json"), "--data", f"npz:{tmp_path / 'data.npz'}"]
    command += ["--shadow", "2", "--private", "2", "--epochs", "1"]
    assert membership.main(command) == 0
    first = read_json(tmp_path / "record.json")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("model*/*.safetensors")}
    assert len(stamps) == 6
    assert membership.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    again = read_json(tmp_path / "record.json")
    assert [part["attacks"] for part in (again["plain"], again["private"])] == [
        part["attacks"] for part in (first["plain"], first["private"])
    ]
    assert first["private"]["epsilon"] <= 3.0
    told = membership_page.tell(json.loads(json.dumps(first)))
    assert all(row["name"] in told for row in first["plain"]["attacks"])
    assert "epsilon" in capsys.readouterr().out


def test_the_page_says_what_the_record_says() -> None:
    text = membership_page.README.read_text(encoding="utf-8")
    assert membership_page.PAGE.fill(text) == text


def test_lira_finds_three_times_what_the_loss_threshold_finds_within_twenty_minutes(
    record: dict[str, Any],
) -> None:
    assert record["plain"]["references"]["count"] == 64
    assert record["plain"]["samples"]["n"] == 5000
    assert record["plain"]["seconds"] < 20 * 60
    rate = membership_page.rate
    assert rate(record, "plain", "lira-online") >= 3 * rate(record, "plain", "loss")


def test_rmia_with_two_reference_models_is_above_lira_with_two(record: dict[str, Any]) -> None:
    best = membership_page.attack(record, "plain", "rmia of 2")["auc"]
    for name in ("lira-online of 2", "lira-offline of 2"):
        assert best > membership_page.attack(record, "plain", name)["auc"]


def test_at_epsilon_three_lira_and_rmia_are_at_chance(record: dict[str, Any]) -> None:
    assert record["private"]["epsilon"] <= 3.0
    for name in ("lira-online", "lira-offline", "rmia"):
        row = membership_page.attack(record, "private", name)
        assert row["at_chance"]
        assert row["interval"][0] <= 0.5
