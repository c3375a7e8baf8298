"""A run that is killed, torn or out of space goes on where it was, and ends as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robust import Linf, Oracle, Verdict, evaluate
from robust.errors import RobustError, RunError
from robust.journal import read_pages
from tests.robust import crash
from tests.robust.subjects import linear, network

JOURNAL = "samples.jsonl"


class Stop(Exception):
    """Raised out of a progress callback, as Ctrl-C would be."""


def stop_after(calls: int) -> Callable[[float, str], None]:
    """A progress callback that ends the run at its n-th call."""
    left = [calls]

    def progress(fraction: float, text: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return progress


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an unbroken run says."""
    out = tmp_path_factory.mktemp("whole") / "run"
    process = crash.start(out)
    assert crash.end(process) == 0
    facts = crash.facts(out)
    broken = [line for line in facts["lines"] if "broken_by" in line]
    assert {line["eps"] for line in broken} == {0.02, 0.04}, "a run in which something happens"
    return facts


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    """The folder of a run that was stopped in the second of its three chunks."""
    out = tmp_path / "run"
    with pytest.raises(Stop):
        crash.run(out, progress=stop_after(7))
    lines = (out / JOURNAL).read_text().splitlines()
    assert sum("commit" in line for line in lines) == 5
    assert any("broken_by" in line for line in lines)
    return out


# -- kill -9 --------------------------------------------------------------------------------------------------


def whole_groups(journal: Path) -> bytes:
    """The journal up to its last commit."""
    raw = journal.read_bytes() if journal.exists() else b""
    return raw[: read_pages(raw).end]


def test_killed_at_five_random_moments_ends_like_an_unbroken_run(tmp_path: Path) -> None:
    out, chance = tmp_path / "run", random.Random(20)
    slow: dict[str, Any] = {"suite": ["fgsm", "pgd"], "seconds": 0.012}  # of a forward; two seconds in all
    assert crash.end(crash.start(tmp_path / "whole", **slow)) == 0
    kept = b""
    for groups in sorted(
        chance.sample(range(13), 5)
    ):  # of 15; the moment is anywhere in the ones that follow
        process = crash.start(out, resume=True, **slow)
        while whole_groups(out / JOURNAL).count(b'{"commit"') < groups:
            assert process.is_alive()
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.08))
        process.kill()
        assert crash.end(process) == -signal.SIGKILL, "it was over before its time"
        now = whole_groups(out / JOURNAL)
        assert now.startswith(kept), "a committed group was lost or changed"
        assert now.count(b'{"commit"') >= groups
        kept = now
    assert not (out / "digests.json").exists()
    assert crash.end(crash.start(out, resume=True, **slow)) == 0
    assert (out / JOURNAL).read_bytes().startswith(kept)
    assert crash.facts(out) == crash.facts(tmp_path / "whole")


def test_killed_before_any_step_of_any_write_ends_like_an_unbroken_run(tmp_path: Path) -> None:
    assert crash.die_everywhere(tmp_path, chunk=12) == 0
    steps = len(list(tmp_path.iterdir()))  # the first one dies before there is a folder, the last one lives
    whole = crash.facts(tmp_path / str(steps))
    assert steps > 25, "every open, rename and removal"
    for number in range(steps):
        out = tmp_path / str(number)
        loaded = None
        if (out / "digests.json").exists():
            loaded = repr(Verdict.load(out).samples)  # finished, only not tidied up
        else:
            with pytest.raises(RunError):
                Verdict.load(out)
        verdict = crash.run(out, resume=True, chunk=12)
        assert loaded in (None, repr(verdict.samples))
        assert crash.facts(out) == whole, number
        left = {path.name for path in out.iterdir()}
        assert left == {"adversarial.safetensors", "digests.json", "manifest.json", JOURNAL}, number


# -- torn files -----------------------------------------------------------------------------------------------


def test_a_journal_torn_anywhere_goes_on_from_its_last_whole_group(cut: Path, whole: dict[str, Any]) -> None:
    raw = (cut / JOURNAL).read_bytes()
    before_last = raw[: raw.rindex(b'{"commit"')]
    end = before_last.rindex(b'{"commit"')
    places = [len(raw) - 1, len(raw) - 2, len(before_last), len(before_last) - 1, end + 1, 5, 0]
    places += random.Random(1).sample(range(len(raw)), 2)
    for place in places:
        out = cut.with_name(f"torn-{place}")
        shutil.copytree(cut, out, dirs_exist_ok=True)
        (out / JOURNAL).write_bytes(raw[:place])
        assert read_pages(raw[:place]).end <= place
        crash.run(out, resume=True)
        assert crash.facts(out) == whole, place


@pytest.mark.parametrize(
    "tail", [b"\0" * 512, b'{"i": 4, "y"', b'{"commit": {"key": "1/0.02/0"}}', b"7\n", b"\xff\n"]
)
def test_what_follows_the_last_group_is_cut_off(tail: bytes, cut: Path, whole: dict[str, Any]) -> None:
    with (cut / JOURNAL).open("ab") as stream:
        stream.write(tail)
    crash.run(cut, resume=True)
    assert crash.facts(cut) == whole


def test_leftovers_of_a_write_are_tolerated(cut: Path, whole: dict[str, Any]) -> None:
    shards = sorted((cut / "evidence").iterdir())
    following = cut / "evidence" / f"{len(shards):06d}.safetensors"
    following.write_bytes(b"a shard that was renamed into place, and never entered")
    (cut / "evidence" / ".000099.safetensors.part").write_bytes(b"half")
    for name in (".manifest.json.part", ".plan.json.part", "report.html.part"):
        (cut / name).write_bytes(b"half")
    (cut / "manifest.json").write_text("{}")
    crash.run(cut, resume=True)
    assert crash.facts(cut) == whole
    assert {path.name for path in cut.iterdir()} == {
        "adversarial.safetensors",
        "digests.json",
        "manifest.json",
        JOURNAL,
    }


def test_a_lost_shard_is_one_line(cut: Path) -> None:
    next((cut / "evidence").iterdir()).unlink()
    with pytest.raises(RunError, match=r"000000\.safetensors is missing") as caught:
        crash.run(cut, resume=True)
    assert "\n" not in str(caught.value)


# -- a full disk ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [10, 100, 700, 2500, 3300, 4200])
def test_a_full_disk_is_one_line_and_loses_nothing(
    largest: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    out, told = tmp_path / "run", tmp_path / "told"
    assert crash.end(crash.start(out, largest=largest, told=told)) == 7
    line = told.read_text()
    assert "\n" not in line
    assert "cannot write" in line
    assert "File too large" in line
    kept = b""
    if largest == 10:
        assert not out.exists(), "nothing half-written"
    else:
        raw = (out / JOURNAL).read_bytes() if (out / JOURNAL).exists() else b""
        assert read_pages(raw).end == len(raw), "only whole groups"
        kept = raw
        assert not list(out.rglob("*.part"))
        assert crash.end(crash.start(out, largest=largest, told=told, resume=True)) == 7, "still full"
        assert (out / JOURNAL).read_bytes() == kept if kept else True
    crash.run(out, resume=True)
    assert (out / JOURNAL).read_bytes().startswith(kept)
    assert crash.facts(out) == whole


def test_a_disk_that_has_no_room_for_the_report_is_one_line(tmp_path: Path) -> None:
    out, told = tmp_path / "run", tmp_path / "told"
    assert crash.end(crash.start(out, largest=12_000, told=told, report=True)) == 7
    assert "report.html: File too large" in told.read_text()
    assert not (out / "digests.json").exists()
    crash.run(out, resume=True, report=True)
    assert "report.html" in json.loads((out / "digests.json").read_text())


# -- what may be resumed --------------------------------------------------------------------------------------


def test_only_the_same_run_is_resumed(cut: Path, whole: dict[str, Any]) -> None:
    before = (cut / JOURNAL).read_bytes()
    clf, x, y = crash.subject()
    other, *_ = crash.subject(seed=3)
    darker, relabelled = x * 0.99, y.clone()
    relabelled[0] = (y[0] + 1) % 4
    for (model, points, labels), change, match in [
        ((clf, x, y), {"seed": 4}, "seed=3, not 4"),
        ((clf, x, y), {"chunk": 6}, "chunk=4, not 6"),
        ((clf, x, y), {"suite": ["pgd"]}, "suite="),
        ((clf, x, y), {"threat": [Linf(0.02), Linf(0.05)]}, "eps="),
        ((clf, x[:11], y[:11]), {}, "another data|n=12, not 11"),
        ((clf, darker, y), {}, "another data"),
        ((clf, x, relabelled), {}, "another data"),
        ((other, x, y), {}, "another model"),
    ]:
        with pytest.raises(RunError, match=match) as caught:
            evaluate(model, points, labels, out=cut, resume=True, **{**crash.CALL, **change})
        assert "\n" not in str(caught.value)
    with pytest.raises(RunError, match="--resume"):
        crash.run(cut)
    with pytest.raises(RunError, match="needs out"):
        crash.run(None, resume=True)
    assert (cut / JOURNAL).read_bytes() == before
    crash.run(cut, resume=True)
    assert crash.facts(cut) == whole


def test_data_that_changed_behind_the_first_look_is_noticed(tmp_path: Path) -> None:
    clf, x, y, _ = linear(n=24)
    call: dict[str, Any] = {"threat": [Linf(0.01), Linf(0.02)], "suite": ["fgsm"], "out": tmp_path / "run"}
    with pytest.raises(Stop):
        evaluate(clf, x, y, progress=stop_after(1), chunk=24, **call)
    changed = x.clone()
    changed[20] += 0.01
    with pytest.raises(RunError, match="sample 20 is not the one"):
        evaluate(clf, changed, y, resume=True, chunk=24, **call)


def test_resuming_a_finished_run_asks_the_model_nothing_and_tidies_up(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = crash.run(out)
    (out / "plan.json").write_text("{}")
    (out / "evidence").mkdir()
    clf, x, y = crash.subject()
    clf.check(x)
    before = clf.cost.forwards
    again = evaluate(clf, x, y, out=out, resume=True, **crash.CALL)
    assert clf.cost.forwards == before
    assert repr(again.samples) == repr(first.samples)
    assert not (out / "plan.json").exists()
    assert not (out / "evidence").exists()
    with pytest.raises(RunError, match="seed"):
        evaluate(clf, x, y, out=out, resume=True, **{**crash.CALL, "seed": 5})


def test_an_oracles_budget_is_not_refilled_by_a_resume(tmp_path: Path) -> None:
    clf, x, y, _ = linear(n=8, wrong=1)
    call: dict[str, Any] = {"threat": Linf(0.01), "suite": ["square"], "chunk": 4, "report": False}
    unbroken = evaluate(Oracle(clf, budget=300), x, y, **call)
    with pytest.raises(Stop):
        evaluate(Oracle(clf, budget=300), x, y, out=tmp_path / "run", progress=stop_after(12), **call)
    fresh = Oracle(clf, budget=300)
    resumed = evaluate(fresh, x, y, out=tmp_path / "run", resume=True, **call)
    assert repr(resumed.samples) == repr(unbroken.samples)
    assert resumed.cost["queries"] == unbroken.cost["queries"] == fresh.cost.queries <= 300


def test_an_error_of_the_data_midway_leaves_a_run_that_goes_on(tmp_path: Path) -> None:
    clf, x, y = network(n=40)
    pairs: list[Any] = [(x[i], int(y[i])) for i in range(40)]
    broken = [*pairs[:30], (x[30] + 2, int(y[30])), *pairs[31:]]
    call: dict[str, Any] = {"threat": Linf(0.02), "suite": ["fgsm"], "chunk": 10, "out": tmp_path / "run"}
    with pytest.raises(RobustError, match="outside the box"):
        evaluate(clf, broken, **call)
    verdict = evaluate(clf, pairs, resume=True, report=False, **call)
    assert repr(verdict.samples) == repr(evaluate(clf, pairs, **{**call, "out": None}).samples)
