"""Verdicts with surrogates: learnt once a run, charged once, the same after a kill, and only with the same models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from robust import Classifier, Linf, Oracle, Verdict, evaluate, suites
from robust.digest import read_json
from robust.errors import RobustError, RunError
from tests.robust.subjects import network

SUITE = ["fgsm", "surrogate"]
EPS = 0.03
ASKED = 100


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A substitute from 100 queries."""
    monkeypatch.setattr(suites, "_SUBSTITUTE", {"queries": ASKED, "epochs": 4})


class Stop(Exception):
    """Raised out of a progress callback, as Ctrl-C would be."""


class Counts:
    """A backend that counts what it is asked."""

    def __init__(self, clf: Classifier) -> None:
        self.clf, self.asked = clf, 0
        self.__name__ = "counts"

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        self.asked += len(x)
        return self.clf.logits(x)


def run(model: Any, out: Path | None = None, **options: Any) -> Verdict:
    _, x, y = network(n=12, seed=1)
    call: dict[str, Any] = {"threat": Linf(EPS), "suite": "transfer", "chunk": 4, "report": False}
    return evaluate(model, x, y, out=out, **{**call, **options})


def table(verdict: Verdict) -> dict[str, dict[str, Any]]:
    return {stage["attack"]: stage for stage in verdict.manifest["stages"]}


def test_full_is_standard_then_transfer_then_decision() -> None:
    names = [stage.attack for stage in suites.stages("full", "linf")[1]]
    standard = [stage.attack for stage in suites.stages("standard", "linf")[1]]
    decision = [stage.attack for stage in suites.stages("decision", "linf")[1]]
    assert names == [*standard, "surrogate", *decision]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_transfer_has_every_norm(norm: str) -> None:
    [stage] = suites.stages("transfer", norm)[1]
    assert stage.attack == "surrogate"
    assert stage.passes() < 1500, "small beside the standard suite's ten thousand"


def test_a_substitute_is_learnt_once_a_run_whatever_its_chunks_and_radii(tmp_path: Path) -> None:
    clf = network(n=12, seed=1)[0]
    verdict = run(clf, tmp_path / "run", suite=SUITE, threat=[Linf(0.01), Linf(EPS)], report=True)
    rows = table(verdict)
    assert rows["prepare"]["cost"]["queries"] == 1000
    assert rows["prepare"]["attempted"] == rows["prepare"]["broken"] == 0
    assert verdict.cost["queries"] == 1000 + sum(
        stage["cost"]["queries"] for stage in verdict.manifest["stages"] if stage["attack"] == "surrogate"
    )
    Verdict.load(tmp_path / "run").verify(*network(n=12, seed=1))
    assert (tmp_path / "run" / "report.html").read_text().count("learnt once, before") == 1
    whole = run(clf, suite=SUITE, threat=[Linf(0.01), Linf(EPS)], chunk=12)
    assert whole.broken_by == verdict.broken_by


def test_nothing_is_learnt_where_no_sample_is_left() -> None:
    verdict = run(network(n=12, seed=1)[0], suite=["pgd", "surrogate"], threat=Linf(0.9))
    assert verdict.robust_accuracy == 0
    assert "prepare" not in table(verdict)


@pytest.mark.parametrize("moment", [1, 2, 3, 5, 6])
def test_a_run_cut_off_and_resumed_asks_for_a_substitute_once_and_ends_like_an_unbroken_one(
    moment: int, tmp_path: Path
) -> None:
    clf = network(n=12, seed=1)[0]
    whole = run(Oracle(Counts(clf), classes=4, name="it"))
    left = [moment]

    def stop(fraction: float, text: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    backend = Counts(clf)
    with pytest.raises(Stop):
        run(Oracle(backend, classes=4, name="it"), tmp_path / "run", progress=stop)
    oracle = Oracle(backend, classes=4, name="it")
    verdict = run(oracle, tmp_path / "run", resume=True)
    assert verdict.broken_by == whole.broken_by
    assert torch.equal(verdict.adversarial, whole.adversarial)
    assert verdict.cost["queries"] == whole.cost["queries"] == oracle.cost.queries
    assert backend.asked < whole.cost["queries"] + 4 * 5, "at most a chunk's points twice"


def test_what_was_learnt_is_charged_even_if_the_kill_came_before_its_group(tmp_path: Path) -> None:
    clf = network(n=12, seed=1)[0]
    backend = Counts(clf)
    calls = [2]

    def stop(fraction: float, text: str) -> None:
        calls[0] -= 1
        if calls[0] < 0:
            raise Stop

    with pytest.raises(Stop):
        run(Oracle(backend, classes=4, name="it"), tmp_path / "run", progress=stop)
    assert list((tmp_path / "run" / "evidence").glob("learned-*"))
    (tmp_path / "run" / "samples.jsonl").write_bytes(b"")  # the group that charges it is lost
    backend.asked = 0
    verdict = run(Oracle(backend, classes=4, name="it"), tmp_path / "run", resume=True)
    assert table(verdict)["prepare"]["cost"]["queries"] == ASKED
    assert backend.asked == verdict.cost["queries"] - ASKED


def test_what_was_learnt_and_is_gone_ends_the_run_in_one_line(tmp_path: Path) -> None:
    clf = network(n=12, seed=1)[0]
    calls = [2]

    def stop(fraction: float, text: str) -> None:
        calls[0] -= 1
        if calls[0] < 0:
            raise Stop

    with pytest.raises(Stop):
        run(Oracle(clf), tmp_path / "run", progress=stop)
    for path in (tmp_path / "run" / "evidence").glob("learned-*"):
        path.unlink()
    with pytest.raises(RunError, match="has learnt is missing"):
        run(Oracle(clf), tmp_path / "run", resume=True)


def test_given_surrogates_are_used_named_and_demanded_again(tmp_path: Path) -> None:
    clf, other, third = (network(n=12, seed=seed)[0] for seed in (1, 1, 7))
    verdict = run(clf, tmp_path / "run", surrogates=[other])
    assert "prepare" not in table(verdict)
    assert verdict.cost["queries"] < 12 * 5
    assert verdict.robust_accuracy < 1
    assert read_json(tmp_path / "run" / "manifest.json")["surrogates"] == [
        {"name": "network", "digest": other.digest()}
    ]
    assert run(clf, tmp_path / "run", surrogates=[other], resume=True).broken_by == verdict.broken_by
    for given in ([], [third], [other, third]):
        with pytest.raises(RunError, match="surrogates"):
            run(clf, tmp_path / "run", surrogates=given, resume=True)


def test_surrogates_for_a_suite_without_transfer_are_refused() -> None:
    clf, other = network(n=12, seed=1)[0], network(n=12, seed=1)[0]
    with pytest.raises(RobustError, match="suite fgsm uses no surrogates"):
        run(clf, suite="fgsm", surrogates=[other])


def test_a_budget_fits_the_substitute_or_is_refused_before_any_query() -> None:
    clf = network(n=12, seed=1)[0]
    poor = Oracle(clf, budget=110)
    with pytest.raises(RobustError, match=r"110 left, but 12 samples need 24 .* and 100 teach a substitute"):
        run(poor)
    assert poor.cost.queries == 0
    enough = Oracle(clf, budget=200)
    verdict = run(enough)
    assert verdict.cost["queries"] == enough.cost.queries <= 200
    assert verdict.robust_accuracy < 1
