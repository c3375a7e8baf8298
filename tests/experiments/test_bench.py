"""Benchmarks: right before fast, and measured in turn."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from robust.attacks.base import Result
from robust.cost import Cost
from robust.errors import ConfigError
from robust.experiments.benchmarks import attacks, engine, harness, queries, standard
from robust.experiments.benchmarks.harness import Contestant, Work, WrongResult, alternate, ratios
from robust.experiments.benchmarks.peers import Peer, Plain, available, torchattacks_part
from robust.experiments.benchmarks.scaling import measure
from robust.twin import Precision
from tests.experiments.bench_parts import CPU, EPS, PEERS, broken, copied, idle, small, subject, work

# -- the harness ------------------------------------------------------------------------------------------------


def test_contestants_run_in_turn_after_a_first_call_of_each_that_stands_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, calls = [0.0], []
    durations = {"a": iter([7.0, 2.0, 3.0]), "b": iter([4.0, 6.0, 6.0])}
    read = SimpleNamespace(perf_counter=lambda: clock[0], process_time=lambda: clock[0] / 2)
    monkeypatch.setattr(harness, "time", read)

    def contestant(name: str) -> Contestant:
        def call() -> str:
            calls.append(name)
            clock[0] += next(durations[name])
            return name

        return Contestant(name, call, check=lambda found: {"said": found})

    timings, order = alternate([contestant("a"), contestant("b")], 2, CPU)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert order == ["a", "b", "a", "b"]
    assert timings["a"]["seconds"] == [2.0, 3.0]
    assert timings["a"]["cpu_seconds"] == [1.0, 1.5]
    assert (timings["a"]["first_seconds"], timings["a"]["compile_seconds"]) == (7.0, 4.5)
    assert timings["b"]["compile_seconds"] == 0.0  # never below nothing
    assert timings["b"]["said"] == "b"
    found = ratios(timings, {"a": "b"})["a"]
    assert found["pairs"] == [3.0, 2.0]
    assert (found["median"], found["min"], found["max"], found["against"]) == (2.5, 2.0, 3.0, "b")
    assert found["included"] == pytest.approx(6.0 / 7.0)


def test_what_a_contestant_compiled_is_warm_again_before_the_rounds_and_its_cache_is_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/users/own")
    calls: list[str] = []
    folders: dict[str, set[str]] = {"compiles": set(), "plain": set()}

    def contestant(name: str) -> Contestant:
        def call() -> None:
            calls.append(name)
            folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
            folders[name].add(str(folder))
            if name == "compiles":
                (folder / "kernel").touch()

        return Contestant(name, call)

    alternate([contestant("compiles"), contestant("plain")], 1, CPU)
    assert calls == ["compiles", "plain", "compiles", "compiles", "plain"]
    assert [len(found) for found in folders.values()] == [1, 1]
    assert not folders["compiles"] & folders["plain"]
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/users/own"


def test_a_record_measures_on_its_threads_and_names_its_conditions() -> None:
    class Counting(harness.Benchmark):
        """Tells the threads."""

        name = "counting"

        def measure(self, work: Work) -> dict[str, Any]:
            return {"seen": torch.get_num_threads()}

    before = torch.get_num_threads()
    record = Counting().record(work(threads=before + 1, seed=3), {"model": "m"})
    assert record["seen"] == before + 1
    assert torch.get_num_threads() == before
    assert record["settings"] == {"model": "m", "eps": EPS, "repeats": 1, "seed": 3, "threads": before + 1}
    assert record["device"]["type"] == "cpu"
    assert record["device"]["name"]
    assert {"python", "torch", "robust"} <= set(record["versions"])
    assert record["commit"]
    assert record["date"].startswith("20")


@pytest.mark.parametrize(
    ("wishes", "part"),
    [
        ({"repeats": 0}, "--repeats: 0 rounds"),
        ({"threads": 0}, "--threads: 0 threads"),
        ({"only": ("strong",)}, "no peer 'strong'; its peers are torchattacks, foolbox, art"),
        ({"modes": ("bfloat61",)}, "did you mean bfloat16"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line_before_anything_is_loaded(
    wishes: dict[str, Any], part: str
) -> None:
    def load() -> Any:
        raise AssertionError("loaded")

    with pytest.raises(ConfigError, match=part):
        attacks.Attacks().prepare(load, **wishes)


def test_a_peer_that_is_absent_has_a_line_and_one_that_is_not_wanted_none() -> None:
    libraries = {**PEERS, "gone": Peer("no_such_package", "gone-toolbox", idle)}
    here, skipped = available(libraries, ())
    assert list(here) == ["strong", "idle"]
    assert skipped == {
        "gone": "gone is not installed; in an environment of its own: pip install gone-toolbox"
    }
    assert available(libraries, ("idle",)) == ({"idle": PEERS["idle"]}, {})
    boxed = {"torchattacks": Peer("torchattacks", "torchattacks", idle)}
    assert "torchattacks" in available(boxed, (), (-1.0, 1.0))[1]


# -- PGD --------------------------------------------------------------------------------------------------------


def test_attacks_measures_every_precision_and_peer_on_the_same_points() -> None:
    modes = ("original", "float32")
    libraries = {**PEERS, "broken": Peer("torch", "broken", broken)}
    record = copied(small(libraries=libraries).record(work(repeats=2, modes=modes)))
    names = [*modes, *(f"{mode}, until broken" for mode in modes), "strong", "idle"]
    assert list(record["contestants"]) == names
    assert record["order"] == names * 2
    for one in record["contestants"].values():
        assert len(one["seconds"]) == len(one["cpu_seconds"]) == 2
        assert 0 <= one["robust_accuracy"] <= 1
    assert record["skipped"] == {"broken": "broken fails: no such thing"}
    assert set(record["probes"]["strong"]["seconds"]) == {"2", "4"}
    assert record["contestants"]["strong"]["batch"] in (2, 4)
    assert set(record["ratios"]) == set(names[:4])
    (against,) = {ratio["against"] for ratio in record["ratios"].values()}
    assert against in PEERS
    assert record["attack"]["faint_eps"] == pytest.approx(EPS / 16)
    assert record["contestants"]["original"]["backwards"] == 20 * 4
    assert record["contestants"]["idle"]["robust_accuracy"] == 1.0
    assert record["model"]["n"] == 4


@pytest.mark.parametrize("lie", ["outside", "claim"])
def test_attacks_refuses_ours_when_it_is_wrong(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(own: Any, eps: float, *others: Any) -> Result:
        points = own.x + (2 * eps if lie == "outside" else 0)
        return Result(points, torch.ones(len(own.x), dtype=torch.bool), torch.zeros(len(own.x)), Cost())

    monkeypatch.setattr(attacks, "_pgd", wrong)
    with pytest.raises(
        WrongResult, match="4 of 4 points" if lie == "outside" else "4 of our claims"
    ) as caught:
        small().record(work())
    assert caught.value.exit_code == 1


def test_a_weaker_attack_of_ours_has_no_ratio() -> None:
    timings = {
        "ours": {"ours": True, "robust_accuracy": 0.400, "faint_robust_accuracy": 0.707},
        "weak": {"ours": True, "robust_accuracy": 0.400, "faint_robust_accuracy": 0.704},
        "peer": {"ours": False, "robust_accuracy": 0.400, "faint_robust_accuracy": 0.700},
    }
    attacks.refuse(timings, ["peer"], 1000)
    assert timings["ours"]["refused"] == "weaker: 70.7% stand, 70.0% under a peer"
    assert "refused" not in timings["weak"]
    assert "refused" not in timings["peer"]


def test_points_of_a_peer_outside_the_ball_break_nothing() -> None:
    clf, x, y = subject()
    own = attacks._Subject(clf, x, y)
    assert own.robust(torch.zeros_like(x), EPS) == (1.0, 4)


# -- the suite, queries, the engine -----------------------------------------------------------------------------


def test_standard_gives_each_component_what_the_ones_before_left() -> None:
    seen = []

    def part(name: str, plain: Any, classes: int, x: Tensor, y: Tensor, eps: float, seed: int) -> Tensor:
        seen.append((name, len(x)))
        fell = torch.zeros(len(x), dtype=torch.bool)
        fell[0] = True
        assert not plain.training
        return fell

    libraries = {"torchattacks": Peer("torch", "fake", idle)}
    bench = standard.Standard(libraries=libraries, part=part)
    record = copied(bench.record(work(load=lambda: subject(6), eps=1.0)))
    assert seen[:4] == [("apgd-ce", 6), ("apgd-t", 5), ("fab-t", 4), ("square", 3)]
    assert record["order"] == ["auto", "torchattacks"]
    peer, ours = record["contestants"]["torchattacks"], record["contestants"]["auto"]
    assert [one["broken"] for one in peer["parts"].values()] == [1, 1, 1, 1]
    assert peer["robust_accuracy"] == pytest.approx(2 / 6)
    assert ours["robust_accuracy"] == 0.0
    assert set(ours["parts"]) == {"clean", "apgd-ce", "apgd-t", "fab-t", "square"}
    assert len(record["comparison"]["auto"]["beyond"]) == 2
    assert record["comparison"]["auto"]["missed"] == []
    assert set(record["ratios"]) == {"auto"}


def test_a_component_of_torchattacks_leaves_the_model_as_it_is_and_claims_what_it_breaks() -> None:
    pytest.importorskip("torchattacks")
    clf, x, y = subject()
    plain = Plain(clf)
    for name in ("apgd-ce", "square"):
        fell = torchattacks_part(name, plain, 10, x, y, 0.5, 0)
        assert not plain.training
        assert bool(fell.any())
    assert not torchattacks_part("apgd-ce", plain, 10, x, y, 1e-6, 0).any()


def test_standard_refuses_a_verdict_without_valid_examples() -> None:
    clf, x, y = subject()
    lie = SimpleNamespace(broken_by=["pgd", None, None, None], points=lambda x: x)
    with pytest.raises(WrongResult, match="1 of 1 broken samples"):
        standard.prove(lie, clf, x, y, EPS)  # type: ignore[arg-type]


def test_comparison_names_both_kinds_of_difference() -> None:
    ours, theirs = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    assert standard.compare(ours, theirs) == {"missed": [1], "beyond": [2], "excess": 0.0}


def test_queries_counts_what_it_asks_at_every_width() -> None:
    bench = queries.Queries(widths=(1, 2), answers=4, queries=3, libraries={})
    record = copied(bench.record(work(modes=("original",))))
    for width in (1, 2):
        assert record["contestants"][f"square original, {width} wide"]["answers"] == 4 + width
        assert record["ratios"][f"oracle, {width} wide"]["against"] == f"bare module, {width} wide"
    assert all(one["per_second"] > 0 for one in record["contestants"].values())
    assert set(record["strength"]["robust_accuracy"]) == {"original"}


def test_engine_compares_pgd_with_as_many_bare_calls() -> None:
    bench = engine.Engine(sizes=(50,))
    record = copied(bench.record(work(load=lambda: subject(50), modes=("original", "float32"))))
    batch = record["calls"]["original"]["batch"]
    assert record["calls"]["original"]["gradients"] * batch == 20 * record["model"]["n"]
    assert record["ratios"]["bare calls, float32"]["against"] == "pgd, float32"
    found = record["scaling"]["50"]
    assert "failed" not in found
    assert found["passes_per_image"] > 2
    assert found["peak_bytes"] >= 0


@pytest.mark.parametrize("precision", ["original", "float32"])
def test_passes_an_image_do_not_grow_with_the_data(precision: Precision) -> None:
    clf, x, y = subject(10)
    few, many = (
        measure({"clf": clf, "x": x, "y": y, "eps": EPS}, size, 0, precision)["passes_per_image"]
        for size in (10, 200)
    )
    assert many == pytest.approx(few, rel=0.02)
