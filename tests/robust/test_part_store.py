"""A run's parts: made once, kept whole, and every second booked once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust.errors import RunError
from robust.part_store import PartStore

ABOUT = {"seed": 0}


def test_a_part_is_made_once_and_the_time_of_nested_parts_is_booked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("robust.part_store.time.perf_counter", lambda: clock[0])
    store, made = PartStore(tmp_path / "run", ABOUT, False, {}, ("parts",)), []

    def inner() -> dict[str, Tensor]:
        made.append("inner")
        clock[0] += 5
        return {"x": torch.ones(2)}

    def outer() -> dict[str, Tensor]:
        made.append("outer")
        clock[0] += 2
        return {"x": 2 * store.tensors("parts/inner", inner)["x"]}

    for _ in range(2):
        assert store.tensors("parts/outer", outer)["x"].tolist() == [2.0, 2.0]
    assert made == ["outer", "inner"]
    assert store.seconds(0.0) == 7
    again = PartStore(tmp_path / "run", ABOUT, True, {}, ("parts",))
    assert again.tensors("parts/inner", inner)["x"].tolist() == [1.0, 1.0]
    assert made == ["outer", "inner"]
    assert again.seconds(0.0) == 7


def test_another_run_s_folder_is_refused_and_attacks_may_be_added(tmp_path: Path) -> None:
    PartStore(tmp_path / "run", ABOUT, False, {"a": {"k": 1}}, ("parts",))
    with pytest.raises(RunError, match="add --resume"):
        PartStore(tmp_path / "run", ABOUT, False, {}, ())
    with pytest.raises(RunError, match="seed=0, and this one 1"):
        PartStore(tmp_path / "run", {"seed": 1}, True, {}, ())
    with pytest.raises(RunError, match="the attack a"):
        PartStore(tmp_path / "run", ABOUT, True, {"a": {"k": 2}}, ())
    PartStore(tmp_path / "run", ABOUT, True, {"b": {"k": 2}}, ("parts",))
