"""The transfer experiment: its record, its page and its claims agree, and its code runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robust import load_model
from robust.digest import read_json
from robust.experiments.transfer import measure, page
from robust.threat import Linf


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return read_json(page.RECORD)


def test_the_page_says_what_the_record_says() -> None:
    text = page.README.read_text(encoding="utf-8")
    assert page.PAGE.fill(text) == text


def test_momentum_diversity_and_variance_gain_over_pgd_by_more_than_the_sampling_error(
    record: dict[str, Any],
) -> None:
    table = measure.merge(record["parts"])
    assert page.gains(table) == dict.fromkeys(page.CLAIMED, True)
    assert table.n == 1000
    assert table.threat["eps"] == pytest.approx(8 / 255)
    assert {fields.get("steps") for fields in table.attacks.values()} == {10}


def test_a_substitute_from_queried_pairs_has_half_the_transfer_of_one_trained_on_the_data(
    record: dict[str, Any],
) -> None:
    table = measure.merge(record["parts"])
    assert min(page.shares(table, "queried").values()) >= 0.5
    assert {told["queries"] for told in record["substitutes"].values()} == {5000}


def test_the_record_is_about_the_shipped_convnet(record: dict[str, Any]) -> None:
    clf = load_model("zoo:cifar10-convnet", device="cpu")
    digests = {model["name"]: model["digest"] for model in measure.merge(record["parts"]).models}
    assert digests["convnet"] == clf.digest()


def test_what_two_parts_measured_both_was_the_same(record: dict[str, Any]) -> None:
    seen: dict[tuple[str, str, str], int] = {}
    for part in record["parts"].values():
        for cell in part["cells"]:
            key = (cell["source"], cell["target"], cell["attack"])
            assert seen.setdefault(key, cell["fooled"]) == cell["fooled"]
    alone = len(measure.ORDER) - len(measure.CHEAP)
    assert len(seen) == 4 * (4 * len(measure.CHEAP) + alone) + 4 * len(measure.FUSED)


def test_a_substitute_is_kept_and_recalled_with_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "LESSON", measure.Lesson(epochs=1))
    target = load_model("zoo:cifar10-convnet", device="cpu")
    first, told = measure.substitute(target, None, 70, tmp_path / "s.safetensors")
    again, _ = measure.substitute(target, None, 70, tmp_path / "s.safetensors")
    assert told["queries"] == 70
    assert 0 <= told["agreement"] <= 1
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(first.logits(x), again.logits(x))
    table = measure.transfer_matrix(
        {"resnet20": target, "s": first},
        x,
        target.logits(x).argmax(1),
        Linf(measure.EPS),
        {"pgd": {}},
        steps=1,
    )
    assert measure.merge({"a": table.to_dict(), "b": table.to_dict()}).cells == table.cells
