"""The benchmark of smoothing: ours must count what a plain loop counts before it has a ratio."""

from __future__ import annotations

import pytest
import torch

from robust import load_data, load_model
from robust.experiments.benchmarks import smoothing, tables
from robust.experiments.benchmarks.harness import Work, WrongResult
from robust.experiments.benchmarks.smoothing import LOOP, Smoothing


def test_ours_count_what_the_loop_counts_and_a_record_has_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoothing, "VOTES", 200)
    clf = load_model("zoo:digits", device="cpu")
    x, y = load_data("digits", n=2).batch(range(2))
    bench = Smoothing()
    record = bench.record(Work(lambda: (clf, x, y), repeats=1, say=lambda line: None))
    assert set(record["contestants"]) == {"float32", "bfloat16", LOOP}
    assert record["contestants"]["bfloat16"]["voter"].startswith("bfloat16")
    heads, rows = bench.table(record)
    assert all(len(row) == len(heads) for row in rows)
    counts = smoothing.plain(clf, x, 300, 0)
    wrong = [{"votes": {str(int(row.argmin())): 300}, "n": 300, "voter": ""} for row in counts]
    with pytest.raises(WrongResult, match="standard errors"):
        smoothing.judge(counts)(wrong)
    assert torch.get_num_threads() >= 1


def test_the_record_is_as_much_faster_than_a_plain_loop_as_the_toolkit_claims() -> None:
    ratios = tables.read_records()["smoothing-cpu"]["ratios"]
    assert ratios["float32"]["median"] >= 1.6
    assert ratios["bfloat16"]["median"] >= 3
