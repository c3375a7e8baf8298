"""The answer log: a kill anywhere costs at most the batch in flight, and never changes what a run finds."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from robust import Linf, Oracle, Verdict, evaluate
from robust.answers import ANSWERS, AnswerLog
from robust.errors import BudgetExceeded, RunError
from robust.oracle import Unanswered
from tests.robust.elsewhere import Death, Elsewhere, points
from tests.robust.subjects import between, linear

SUBJECT = linear(n=8, wrong=1)
CALL: dict[str, Any] = {
    "threat": Linf(between(SUBJECT.radius, 0.6)), "suite": ["simba", "square"], "chunk": 4, "report": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Searches of a few queries."""
    from robust import suites

    stages = [suites.Stage("simba", {"queries": 3}), suites.Stage("square", {"queries": 5})]
    monkeypatch.setattr("robust.plan.stages", lambda suite, norm, black_box: ("short", stages))
    monkeypatch.setattr("robust.oracle.time.sleep", lambda seconds: None)


def run(backend: Elsewhere, out: Path | None, budget: int | None = None, **options: Any) -> Verdict:
    """One run on an oracle of its own, as every process has."""
    oracle = Oracle(backend, budget=budget, batch=4)
    return evaluate(oracle, SUBJECT.x, SUBJECT.y, out=out, **{**CALL, **options})


def whole(budget: int | None = None) -> tuple[Verdict, Elsewhere]:
    """The unbroken run."""
    backend = Elsewhere(SUBJECT.clf)
    return run(backend, None, budget), backend


def test_killed_around_every_single_sending_it_ends_the_same_for_one_batch_more(tmp_path: Path) -> None:
    unbroken, plain = whole()
    assert 0 < unbroken.robust_accuracy < 0.9
    assert unbroken.cost["queries"] == plain.points
    for number, batch in enumerate(plain.batches):
        for late in (False, True):
            out = tmp_path / f"{number}-{late}"
            backend = Elsewhere(SUBJECT.clf, die_at=number, late=late)
            with pytest.raises(Death):
                run(backend, out)
            resumed = run(backend, out, resume=True)
            assert repr(resumed.samples) == repr(unbroken.samples), (number, late)
            assert torch.equal(resumed.adversarial, unbroken.adversarial)
            assert backend.points == plain.points + (batch if late else 0)
            assert resumed.cost["queries"] == plain.points + batch, (
                "in flight is spent, whether it arrived or not"
            )
            assert resumed.manifest["oracle"]["repeated"] == batch
            assert any(f"{batch} queries were sent again" in line for line in resumed.warnings)
            assert not (out / ANSWERS).exists()
            if late:
                assert backend.keys[number] == backend.keys[number + 1], "the same batch has the same key"
            assert len(set(backend.keys)) == len(plain.keys)


@pytest.mark.parametrize("after", [False, True])
def test_killed_around_every_single_line_of_the_log(
    after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, plain = whole()
    write, lines = AnswerLog._append, 2 * len(plain.batches)
    left = [0]

    def append(log: AnswerLog, content: bytes, flush: bool = False) -> None:
        left[0] -= 1
        if left[0] == -1 and not after:
            raise Death
        write(log, content, flush)
        if left[0] == -1:
            raise Death

    for number in range(0, lines, 3):
        left[0] = number
        backend, out = Elsewhere(SUBJECT.clf), tmp_path / str(number)
        monkeypatch.setattr(AnswerLog, "_append", append)
        with pytest.raises(Death):
            run(backend, out)
        monkeypatch.setattr(AnswerLog, "_append", write)
        resumed = run(backend, out, resume=True)
        assert repr(resumed.samples) == repr(unbroken.samples), number
        assert plain.points <= backend.points <= plain.points + 4
        assert backend.points <= resumed.cost["queries"] <= plain.points + 4


def test_killed_between_a_group_s_commit_and_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unbroken, plain = whole()
    drop, died = AnswerLog.drop, set[str]()

    def die(log: AnswerLog) -> None:
        if log.group not in died and log.path.exists() and log.path.stat().st_size:
            died.add(log.group)
            raise Death
        drop(log)

    monkeypatch.setattr(AnswerLog, "drop", die)
    backend, verdict = Elsewhere(SUBJECT.clf), None
    while verdict is None:
        with suppress(Death):
            verdict = run(backend, tmp_path / "run", resume=True)
    assert len(died) == 6, "every group"
    assert repr(verdict.samples) == repr(unbroken.samples)
    assert (backend.points, verdict.cost["queries"]) == (plain.points, plain.points)


def test_killed_again_and_again_at_one_place_every_kill_costs_one_batch(tmp_path: Path) -> None:
    unbroken, plain = whole()
    out = tmp_path / "run"
    for death in range(3):
        backend = Elsewhere(SUBJECT.clf, die_at=0 if death else 5)
        with pytest.raises(Death):
            run(backend, out, resume=True)
    verdict = run(Elsewhere(SUBJECT.clf), out, resume=True)
    assert repr(verdict.samples) == repr(unbroken.samples)
    assert verdict.manifest["oracle"]["repeated"] == 3 * plain.batches[5]


def test_a_budget_with_room_decides_as_if_nothing_had_happened_and_holds(tmp_path: Path) -> None:
    budget = 1000
    unbroken, plain = whole(budget)
    for number in range(0, len(plain.batches), 4):
        backend, out = Elsewhere(SUBJECT.clf, die_at=number), tmp_path / str(number)
        with pytest.raises(Death):
            run(backend, out, budget)
        resumed = run(backend, out, budget, resume=True)
        assert repr(resumed.samples) == repr(unbroken.samples), number


@pytest.mark.parametrize("budget", [30, 42])
def test_a_tight_budget_is_never_exceeded_by_resuming(budget: int, tmp_path: Path) -> None:
    _, plain = whole(budget)
    assert budget - 4 < plain.points <= budget, "it is tight"
    for number in range(len(plain.batches)):
        backend, out = Elsewhere(SUBJECT.clf, die_at=number), tmp_path / str(number)
        with pytest.raises(Death):
            run(backend, out, budget)
        verdict = run(backend, out, budget, resume=True)
        assert backend.points <= verdict.cost["queries"] <= budget


def test_what_was_sent_twice_changes_no_share_before_the_budget_ends(tmp_path: Path) -> None:
    def asked(out: Path) -> list[int]:
        commits = [
            json.loads(line).get("commit") for line in (out / "samples.jsonl").read_text().splitlines()
        ]
        return [commit["cost"]["queries"] - commit.get("repeated", 0) for commit in commits if commit]

    for budget in (34, 38, 42):
        run(Elsewhere(SUBJECT.clf), tmp_path / f"whole-{budget}", budget)
        out = tmp_path / f"killed-{budget}"
        with pytest.raises(Death):
            run(Elsewhere(SUBJECT.clf, die_at=0), out, budget)
        run(Elsewhere(SUBJECT.clf), out, budget, resume=True)
        assert asked(out)[:-1] == asked(tmp_path / f"whole-{budget}")[:-1]


def test_kills_that_spend_the_whole_budget_are_one_line_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    out, points, line = tmp_path / "run", 0, ""
    for _ in range(10):
        backend = Elsewhere(SUBJECT.clf, die_at=0)  # among the clean points, which no run can do without
        with suppress(Death):
            try:
                run(backend, out, 30, resume=True)
            except BudgetExceeded as error:
                line = str(error)
        points += backend.points
    assert line.startswith("the query budget of 30 is spent: ")
    assert points <= 30
    verdict = run(Elsewhere(SUBJECT.clf), out, 60, resume=True)
    assert points < verdict.cost["queries"] <= 60


@pytest.mark.parametrize(
    "tail", [b'{"sent": "k", "poi', b'{"answer": "?", "shape": [1]}\n', b"\0" * 64, b"7\n"]
)
def test_a_torn_or_senseless_tail_is_cut_off(tail: bytes, tmp_path: Path) -> None:
    unbroken, plain = whole()
    backend, out = Elsewhere(SUBJECT.clf, die_at=9), tmp_path / "run"
    with pytest.raises(Death):
        run(backend, out)
    with (out / ANSWERS).open("ab") as stream:
        stream.write(tail)
    verdict = run(backend, out, resume=True)
    assert repr(verdict.samples) == repr(unbroken.samples)
    assert backend.points == plain.points + plain.batches[9]


def test_batches_that_do_not_come_again_stay_spent(tmp_path: Path) -> None:
    log, x = AnswerLog(tmp_path), points(3)
    assert log.begin("g", ()) == 0
    for key in "abc":
        log.intend(key, x + ord(key))
        log.answer(key, x.flatten(1))
    log.intend("d", x)
    again = AnswerLog(tmp_path)
    assert again.begin("g", ()) == 0
    first = again.recall(x + ord("a"))
    assert first is not None
    assert first.answer is not None
    assert torch.equal(first.answer, x.flatten(1))
    assert again.recall(x) is None, "another batch than the one that was sent at this place"
    assert again.settle() == 9
    assert again.settle() == 0
    again.intend("e", x)
    third = AnswerLog(tmp_path)
    assert third.begin("g", ()) == 9, "a later process knows it too"
    kept = third.recall(x + ord("a")), third.recall(x)
    assert [sent.key for sent in kept if sent] == ["a", "e"]
    assert AnswerLog(tmp_path).begin("other", ()) == 15, "a log of a group that never ended was paid for"
    assert AnswerLog(tmp_path).begin("other", {"other"}) == 0


def test_answers_come_back_bit_for_bit(tmp_path: Path) -> None:
    scores = torch.tensor([[0.1, -0.0, 1e-45], [3.4e38, 1 / 3, 7.0]])
    for number, answer in enumerate((scores, torch.tensor([3, -1]))):
        log = AnswerLog(tmp_path)
        log.begin(str(number), {"0"})
        log.intend("k", points(2))
        log.answer("k", answer)
        log = AnswerLog(tmp_path)
        log.begin(str(number), ())
        sent = log.recall(points(2))
        assert sent is not None
        assert sent.answer is not None
        assert sent.answer.dtype == answer.dtype
        assert sent.answer.numpy().tobytes() == answer.numpy().tobytes()


def test_a_sending_that_was_refused_costs_nothing_and_one_that_was_lost_costs_twice(tmp_path: Path) -> None:
    class Busy(Elsewhere):
        faults = (Unanswered("busy", spent=False), Unanswered("lost", spent=True))

        def send(self, x: torch.Tensor, key: str) -> torch.Tensor:
            self.keys.append(key)
            if self.faults:
                fault, *self.faults = self.faults
                raise fault
            return self.clf.logits(x)

    oracle = Oracle(Busy(SUBJECT.clf), retries=2)
    oracle.log = AnswerLog(tmp_path)
    with oracle.group("g", ()) as spent:
        first = oracle.scores(SUBJECT.x[:4])
    assert spent == [8, 4]
    assert (oracle.cost.queries, oracle.repeated, oracle.asked) == (8, 4, 4)
    assert len(set(oracle.backend.keys)) == 1
    again = Oracle(Busy(SUBJECT.clf))
    again.log = AnswerLog(tmp_path)
    with again.group("g", ()) as spent:
        assert torch.equal(again.scores(SUBJECT.x[:4]), first)
    assert spent == [8, 4]
    assert (again.cost.queries, again.repeated) == (8, 4), "what was recalled costs what it cost"
    assert again.backend.keys == []


def test_a_sending_again_that_the_budget_does_not_allow_is_not_made() -> None:
    class Lost(Elsewhere):
        def send(self, x: torch.Tensor, key: str) -> torch.Tensor:
            self.batches.append(len(x))
            raise Unanswered("lost", spent=True)

    oracle = Oracle(Lost(SUBJECT.clf), budget=10, retries=5)
    with pytest.raises(BudgetExceeded, match="budget of 10 is spent: 4 asked, 2 left"):
        oracle.scores(SUBJECT.x[:4])
    assert oracle.backend.batches == [4, 4]


def test_the_same_oracle_may_go_on_after_an_error_and_counts_nothing_twice(tmp_path: Path) -> None:
    _, plain = whole(60)
    oracle = Oracle(Elsewhere(SUBJECT.clf, die_at=9), budget=60, batch=4)
    with pytest.raises(Death):
        evaluate(oracle, SUBJECT.x, SUBJECT.y, out=tmp_path / "run", **CALL)
    oracle.scores(SUBJECT.x[:2])  # and something else meanwhile
    resumed = evaluate(oracle, SUBJECT.x, SUBJECT.y, out=tmp_path / "run", resume=True, **CALL)
    lost = plain.batches[9]
    assert resumed.cost["queries"] == plain.points + lost
    assert oracle.cost.queries == oracle.backend.points == plain.points + lost + 2


def test_another_kind_of_answers_is_another_run(tmp_path: Path) -> None:
    with pytest.raises(Death):
        run(Elsewhere(SUBJECT.clf, die_at=3), tmp_path / "run")
    labels = Oracle(Elsewhere(SUBJECT.clf), answers="labels", classes=3, batch=4)
    with pytest.raises(RunError, match="answers='scores', not 'labels'"):
        evaluate(labels, SUBJECT.x, SUBJECT.y, out=tmp_path / "run", resume=True, **CALL)


def test_a_full_disk_is_one_line_and_no_reason_to_ask_again(tmp_path: Path) -> None:
    backend = Elsewhere(SUBJECT.clf)
    oracle = Oracle(backend)
    oracle.log = AnswerLog(tmp_path)
    oracle.log.begin("g", ())
    oracle.log.path = tmp_path / "no" / "folder"
    with pytest.raises(RunError, match=r"cannot write .*folder: No such file"):
        oracle.scores(SUBJECT.x)
    assert backend.batches == [], "what cannot be noted is not sent"
