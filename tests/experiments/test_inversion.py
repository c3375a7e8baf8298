"""The inversion experiment: it runs and goes on, the page says what the record says, and the claims hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from robust.digest import read_json
from robust.experiments.privacy import inversion, inversion_page

MODELS = ("lenet-sigmoid", "lenet-relu")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """What was recorded."""
    if not inversion_page.RECORD.exists():
        pytest.skip("no record of inversion yet: experiments/privacy/README.md tells how it is made")
    return read_json(inversion_page.RECORD)


def test_the_experiment_runs_goes_on_and_is_told(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (8, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(8))
    command = [str(tmp_path / "run"), str(tmp_path / "record.json"), "--data", f"npz:{tmp_path / 'data.npz'}"]
    command += ["--n", "2", "--held-out", "6", "--restarts", "2", "--share", "0.003"]
    assert inversion.main(command) == 0
    first = read_json(tmp_path / "record.json")
    assert [part["row"] for part in first["rows"]] == [
        f"{model}-{kind}" for model in MODELS for kind in ("plain", "noised", "more", "prior")
    ]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*.safetensors")}
    assert len(stamps) == 16
    assert inversion.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert read_json(tmp_path / "record.json")["rows"] == first["rows"]
    told = inversion_page.tell(json.loads(json.dumps(first)))
    assert all(part["what"] in told for part in first["rows"])


def test_the_page_says_what_the_record_says() -> None:
    text = inversion_page.README.read_text(encoding="utf-8")
    assert inversion_page.PAGE.fill(text) == text


@pytest.mark.parametrize("model", MODELS)
def test_twenty_images_are_seen_again_in_plain_gradients(model: str, record: dict[str, Any]) -> None:
    plain = inversion_page.row(record, f"{model}-plain")
    assert len(plain["samples"]) == 20
    assert plain["protocol"]["clip"] is None
    assert not plain["known_labels"]
    assert plain["psnr"] >= 25


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", ["noised", "more", "prior"])
def test_noise_leaves_no_more_than_the_guess_also_with_more_steps_and_starts(
    model: str, kind: str, record: dict[str, Any]
) -> None:
    noised = inversion_page.row(record, f"{model}-{kind}")
    assert (noised["protocol"]["clip"], noised["protocol"]["noise"]) == (1.0, 0.1)
    assert noised["known_labels"]
    assert noised["psnr"] <= noised["guess_psnr"] + 1
    if kind == "more":
        usual = inversion_page.row(record, f"{model}-noised")
        assert noised["restarts"] >= 4
        assert noised["steps"] >= 2 * usual["steps"]
