"""The ledger: killed, torn, damaged, on a full disk, opened twice, it never says less than was taken."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robust.defenses.privacy import Ledger, LedgerError, Mechanism, Phase, read_ledger

STEP = Mechanism(noise_multiplier=1.0, sample_rate=0.01)
LOUD = Mechanism(noise_multiplier=2.0, sample_rate=0.01)


def counted(path: Path) -> dict[float, int]:
    """Steps that count, by their noise."""
    found: dict[float, int] = {}
    for mechanism, count, _ in read_ledger(path):
        found[mechanism.noise_multiplier] = found.get(mechanism.noise_multiplier, 0) + count
    return found


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def test_what_is_booked_is_read_back(path: Path) -> None:
    adaptive = Mechanism(noise_multiplier=1.5, sample_rate=0.01, count_noise=4.0)
    with Ledger(path) as ledger:
        assert [ledger.book(step) for step in (STEP, STEP, adaptive)] == [1, 1, 1]
        assert ledger.phases() == [Phase(STEP, 2, True), Phase(adaptive, 1, False)]
    assert read_ledger(path) == [Phase(STEP, 2, True), Phase(adaptive, 1, False)]


def test_restarts_compose(path: Path) -> None:
    for _ in range(3):
        with Ledger(path) as ledger:
            for _ in range(4):
                ledger.book(STEP)
    assert read_ledger(path) == [Phase(STEP, 4, True)] * 3
    shuffled = Mechanism(noise_multiplier=1.0, sample_rate=0.25, sampling="shuffled")
    with pytest.raises(LedgerError, match="accounts for poisson batches"), Ledger(path) as ledger:
        ledger.book(shuffled)


def test_a_line_is_on_disk_before_book_returns(path: Path) -> None:
    with Ledger(path) as ledger:
        for taken in range(1, 5):
            ledger.book(STEP)
            assert counted(path) == {1.0: taken}


def test_a_block_is_booked_at_once_and_given_back_at_a_clean_end_only(path: Path) -> None:
    with Ledger(path, block=10) as ledger:
        assert [ledger.book(STEP) for _ in range(12)] == [10, *[0] * 9, 10, 0]
        assert counted(path) == {1.0: 20}
        assert ledger.book(LOUD, most=3) == 3
        assert counted(path) == {1.0: 12, 2.0: 3}
    assert counted(path) == {1.0: 12, 2.0: 1}


CHILD = """
import sys
from robust.defenses.privacy import Ledger, Mechanism
path, taken, block, run = sys.argv[1:]
step = Mechanism(noise_multiplier=1.0, sample_rate=0.01)
with Ledger(path, block=int(block), run=run or None) as ledger, open(taken, "ab", buffering=0) as log:
    for number in range(100_000):
        ledger.book(step, step=number if run else None)
        log.write(b".")  # the step is taken
        if number == 3: print("going", flush=True)
"""


@pytest.mark.parametrize("block", [1, 7])
def test_kill_9_at_any_moment_never_undercounts(path: Path, root: Path, block: int) -> None:
    taken = path.with_name("taken")
    Ledger(path).close()
    for moment in range(3):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(path), str(taken), str(block), ""],
            cwd=root,
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.017 * moment)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        done = taken.stat().st_size
        booked = sum(counted(path).values())
        assert done <= booked <= done + 3 * block
    with Ledger(path):  # the dead process holds no lock
        pass


def test_a_run_that_resumes_bit_for_bit_pays_once(path: Path) -> None:
    with Ledger(path, run="a") as ledger:
        for number in range(8):
            ledger.book(STEP, step=number)
    with Ledger(path, run="a") as ledger:  # from the checkpoint after step 4
        assert [ledger.book(STEP, step=number) for number in range(5, 10)] == [0, 0, 0, 1, 1]
    whole = path.with_name("whole.jsonl")
    with Ledger(whole, run="a") as ledger:
        for number in range(10):
            ledger.book(STEP, step=number)
    assert read_ledger(path) == read_ledger(whole) == [Phase(STEP, 10, True)]
    with Ledger(path, run="b") as ledger:
        ledger.book(STEP, step=0)
    assert counted(path) == {1.0: 11}


def test_a_resumed_run_gives_back_nothing_that_the_killed_one_booked(path: Path) -> None:
    first = Ledger(path, run="a", block=10)
    for number in range(6):
        first.book(STEP, step=number)
    first._release()  # as a kill would: nothing is given back
    with Ledger(path, run="a", block=10) as second:
        assert second.book(STEP, step=2) == 0
    assert counted(path) == {1.0: 10}
    with Ledger(path, run="a", block=10) as third:
        for number in range(2, 12):
            third.book(STEP, step=number)
    assert counted(path) == {1.0: 12}


def test_what_a_killed_run_booked_ahead_stays_spent_when_the_noise_changes(path: Path) -> None:
    first = Ledger(path, run="a", block=10)
    first.book(STEP, step=0)
    first._release()
    with Ledger(path, run="a") as second:
        assert second.book(STEP, step=3) == 0
        assert second.book(LOUD, step=4) == 1
        with pytest.raises(LedgerError, match=r"step 0 of a was booked as .* is another run"):
            second.book(LOUD, step=0)
    assert counted(path) == {1.0: 10, 2.0: 1}


def test_only_a_named_run_may_repeat_and_it_must_say_which_step(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.book(STEP)
        with pytest.raises(LedgerError, match="step 0 is not the next one, 1"):
            ledger.book(STEP, step=0)
    with Ledger(path, run="a") as ledger:
        with pytest.raises(LedgerError, match="give step="):
            ledger.book(STEP)
        with pytest.raises(LedgerError, match="the next one is 0"):
            ledger.book(STEP, step=5)


@pytest.mark.parametrize("cut", [1, 2, 30, 100, 150])
def test_a_torn_last_line_counts_as_spent(path: Path, cut: int) -> None:
    with Ledger(path, block=5) as ledger:
        for _ in range(3):
            ledger.book(STEP)
        ledger.book(LOUD)
    whole = path.read_bytes()
    before = counted(path)
    torn = path.with_name("torn.jsonl")
    *_, last = whole.splitlines(keepends=True)
    torn.write_bytes(whole + last[: min(cut, len(last) - 1)])
    assert counted(torn) == {1.0: before[1.0] + 5, 2.0: before[2.0]}, (
        "the costliest step, a whole block of it"
    )
    with Ledger(torn):
        pass
    assert counted(torn) == {1.0: before[1.0] + 5, 2.0: before[2.0]}, "and so it stays"
    assert torn.read_bytes().startswith(whole)


def test_a_last_line_that_only_lacks_its_end_counts_as_what_it_says(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger.book(STEP)
        ledger.book(LOUD)
    path.write_bytes(path.read_bytes()[:-1])
    assert counted(path) == {1.0: 1, 2.0: 1}
    with Ledger(path) as ledger:
        ledger.book(STEP)
    assert counted(path) == {1.0: 2, 2.0: 1}


def test_every_prefix_of_a_ledger_counts_all_steps_whose_booking_returned(path: Path) -> None:
    sizes = []
    with Ledger(path) as ledger:
        for _ in range(3):
            ledger.book(STEP)
            sizes.append(path.stat().st_size)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with Ledger(path):
            pass
        assert sum(counted(path).values()) >= sum(size <= length for size in sizes)


@pytest.mark.parametrize("line", [0, 1, 2, 3, -1])
def test_a_damaged_line_is_refused_with_its_number(path: Path, line: int) -> None:
    with Ledger(path) as ledger:
        for _ in range(3):
            ledger.book(STEP)
    lines = path.read_bytes().splitlines(keepends=True)
    number = range(1, len(lines) + 1)[line]
    lines[line] = lines[line].replace(b'"', b"'", 1)
    path.write_bytes(b"".join(lines))
    where = "is no privacy ledger" if number == 1 else f":{number}: this line is damaged"
    for use in (read_ledger, Ledger):
        with pytest.raises(LedgerError, match=where) as caught:
            use(path)
        assert "\n" not in str(caught.value)


def test_edits_and_missing_lines_show(path: Path) -> None:
    with Ledger(path) as ledger:
        for _ in range(3):
            ledger.book(STEP)
    lines = path.read_bytes().splitlines(keepends=True)
    for other in (
        [*lines[:3], *lines[4:]],
        [*lines[:3], lines[3].replace(b'"noise_multiplier": 1.0', b'"noise_multiplier": 9.0'), *lines[4:]],
    ):
        path.write_bytes(b"".join(other))
        with pytest.raises(LedgerError, match="damaged"):
            read_ledger(path)


FULL = """
import resource, signal, sys
from robust.defenses.privacy import Ledger, LedgerError, Mechanism, read_ledger
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
step, path = Mechanism(noise_multiplier=1.0, sample_rate=0.01), sys.argv[1]
taken = 0
with Ledger(path) as ledger:
    ledger.book(step)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    taken = 1
    try:
        while taken < 100:
            ledger.book(step)
            taken += 1
    except LedgerError as error:
        print(error)
    assert sum(phase.steps for phase in ledger.phases()) == taken
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ledger.book(step)  # there is room again
    taken += 1
print(taken, sum(phase.steps for phase in read_ledger(path)))
"""


def test_on_a_full_disk_the_step_is_refused_and_nothing_is_lost(path: Path, root: Path) -> None:
    Ledger(path).close()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    line, numbers = done.stdout.splitlines()
    assert "could not be booked, so it must not be taken" in line
    taken, booked = map(int, numbers.split())
    assert taken == booked
    assert 3 < taken < 100


def test_a_failed_write_that_cannot_be_undone_shuts_the_ledger(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    ledger = Ledger(path)
    ledger.book(STEP)
    monkeypatch.setattr("robust.defenses.privacy.ledger._flush", fail)
    monkeypatch.setattr(os, "ftruncate", fail)
    with pytest.raises(LedgerError, match="must not be taken: Input/output error"):
        ledger.book(STEP)
    monkeypatch.undo()
    with pytest.raises(LedgerError, match="open the ledger again"):
        ledger.book(STEP)
    ledger.close()
    assert counted(path)[1.0] >= 1
    with Ledger(path) as again:
        again.book(STEP)


def _try(path: Path, answers: multiprocessing.SimpleQueue[str]) -> None:
    try:
        Ledger(path).close()
        answers.put("opened")
    except LedgerError as error:
        answers.put(str(error))


def test_two_processes_on_one_ledger_are_refused(path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    answers: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    with Ledger(path) as ledger:
        ledger.book(STEP)
        child = context.Process(target=_try, args=(path, answers))
        child.start()
        assert "in use by another process" in answers.get()
        child.join()
        with pytest.raises(LedgerError, match="in use by this process"):
            Ledger(path)
        ledger.book(STEP)  # the refused ones took no lock away
        assert counted(path) == {1.0: 2}, "reading needs no lock"
    Ledger(path).close()


def test_a_forked_process_cannot_book(path: Path) -> None:
    with Ledger(path) as ledger:
        ledger._owner += 1  # as in a fork
        with pytest.raises(LedgerError, match="a forked process cannot book"):
            ledger.book(STEP)
        ledger._owner -= 1


def test_places_that_cannot_hold_a_ledger(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot be"):
        Ledger(tmp_path / "none" / "ledger.jsonl")
    with pytest.raises(LedgerError, match="cannot be read"):
        read_ledger(tmp_path / "none.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"some": "file"}) + "\n")
    for use in (read_ledger, Ledger):
        with pytest.raises(LedgerError, match="is no privacy ledger"):
            use(other)
    with pytest.raises(LedgerError, match="block=0"):
        Ledger(tmp_path / "ledger.jsonl", block=0)
    closed = Ledger(tmp_path / "ledger.jsonl")
    closed.close()
    with pytest.raises(LedgerError, match="closed"):
        closed.book(STEP)
