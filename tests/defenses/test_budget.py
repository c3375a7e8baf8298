"""Budgets: what calibration finds and what a monitor lets through costs at most the target, and nearly all of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from robust.defenses.privacy import (
    BudgetSpent,
    Ledger,
    Mechanism,
    Monitor,
    Phase,
    calibrate,
    epsilon,
    read_ledger,
    spent,
)
from robust.defenses.privacy.calibrate import Budget, least_private
from robust.errors import ConfigError

pytest.importorskip("dp_accounting", reason="accountants need the extra `privacy`")

STEP = Mechanism(noise_multiplier=1.0, sample_rate=0.01)
RDP = Budget(epsilon=2.0, delta=1e-5, accountant="rdp")


@pytest.mark.parametrize("sampling", ["poisson", "fixed", "shuffled"])
@pytest.mark.parametrize("missing", ["noise_multiplier", "sample_rate", "steps"])
@pytest.mark.parametrize("target", [0.7, 4.0])
def test_calibration_uses_the_budget_and_never_exceeds_it(sampling: str, missing: str, target: float) -> None:
    given = {"noise_multiplier": 6.0, "sample_rate": 0.02, "steps": 300}
    given.pop(missing)
    accountant = (
        "rdp"
        if sampling != "fixed" or missing == "steps"
        else "zcdp"
        if missing == "noise_multiplier"
        else "gdp"
    )
    if accountant == "gdp":
        return
    found = calibrate(target_epsilon=target, delta=1e-5, sampling=sampling, accountant=accountant, **given)
    again = epsilon(
        noise_multiplier=found.mechanism.noise_multiplier, sample_rate=found.mechanism.sample_rate,
        steps=found.steps, delta=1e-5, accountant=accountant, sampling=sampling,
    )  # fmt: skip
    assert found.solved == missing
    assert again == found.epsilon <= target
    riskier = {
        "noise_multiplier": [
            (Mechanism(noise_multiplier=found.value * 0.999, sample_rate=0.02, sampling=sampling), 300)
        ],
        "sample_rate": [
            (Mechanism(noise_multiplier=6.0, sample_rate=min(found.value * 1.001, 1), sampling=sampling), 300)
        ],
        "steps": [(found.mechanism, found.steps + 1)],
    }[missing]
    assert spent(riskier, delta=1e-5, accountant=accountant) > target or found.value == 1.0


def test_calibration_by_the_default_accountant() -> None:
    found = calibrate(target_epsilon=3.0, delta=1e-5, noise_multiplier=1.0, sample_rate=0.01)
    assert found.steps == 2666
    assert found.epsilon <= 3.0 < epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=2667, delta=1e-5)
    assert found.epsilon.about.accountant == "pld"


def test_calibration_is_monotone_in_the_target() -> None:
    noises = [
        calibrate(target_epsilon=target, delta=1e-5, sample_rate=0.01, steps=500, accountant="rdp").value
        for target in (0.3, 1, 3, 10, 30)
    ]
    assert noises == sorted(noises, reverse=True)
    assert len(set(noises)) == 5


def test_what_was_spent_before_is_part_of_the_budget() -> None:
    before = [(STEP, 300)]
    found = calibrate(
        target_epsilon=2.0,
        delta=1e-5,
        noise_multiplier=2.0,
        sample_rate=0.01,
        accountant="rdp",
        before=before,
    )
    assert (
        spent([*before, (found.mechanism, found.steps)], delta=1e-5, accountant="rdp") == found.epsilon <= 2.0
    )
    with pytest.raises(ConfigError, match="already over"):
        calibrate(
            target_epsilon=0.5,
            delta=1e-5,
            noise_multiplier=2.0,
            sample_rate=0.01,
            accountant="rdp",
            before=before,
        )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": None, "sample_rate": None}, "finds one of"),
        ({"noise_multiplier": 1.0}, "finds one of"),
        ({"target_epsilon": 0.0}, "a budget of epsilon 0"),
        ({"target_epsilon": math.inf}, "a budget of epsilon inf"),
        ({"target_epsilon": math.nan}, "a budget of epsilon nan"),
        ({"delta": 0.0}, "delta=0"),
        ({"accountant": "gdp"}, "may understate, so it keeps no budget; pld, prv, rdp, zcdp do"),
        ({"sampling": "fixed", "accountant": "pld"}, "pld cannot serve fixed batches"),
        ({"steps": 0}, "steps=0"),
        ({"steps": None, "noise_multiplier": 0.01, "sample_rate": 1.0}, "not even one step keeps"),
        ({"sample_rate": None, "noise_multiplier": 1e-4}, "no sample rate down to 1e-9"),
    ],
)
def test_an_impossible_calibration_is_one_line(change: dict[str, object], line: str) -> None:
    given = {
        "target_epsilon": 1.0,
        "delta": 1e-5,
        "sample_rate": 0.01,
        "steps": 100,
        "accountant": "rdp",
    } | change
    with pytest.raises(ConfigError, match=line) as caught:
        calibrate(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("edge", [1.0, 2.0, 63.0, 64.0, 1023.7, 5e6])
def test_the_search_finds_the_last_whole_step_of_any_monotone_cost(edge: float) -> None:
    for power in (0.3, 1.0, 4.0):
        asked: list[float] = []

        def excess(steps: float, power: float = power, asked: list[float] = asked) -> float:
            asked.append(steps)
            return power * math.log(steps / edge)

        assert least_private(excess, "steps", 1024.0) == math.floor(edge)
        assert len(asked) < 30
    assert least_private(lambda steps: 0.0 if steps <= edge else math.inf, "steps", 7.0) == math.floor(edge)


def drain(monitor: Monitor, *mechanisms: Mechanism, first: int | None = None, most: int = 100_000) -> int:
    """Takes steps until the budget is spent or `most` are taken; how many were."""
    for taken in range(most):
        try:
            monitor.take(mechanisms[taken % len(mechanisms)], step=None if first is None else first + taken)
        except BudgetSpent:
            return taken
    return most


def test_the_monitor_stops_at_the_last_step_that_fits() -> None:
    monitor = Monitor(RDP)
    left = monitor.remaining(STEP)
    taken = drain(monitor, STEP)
    assert taken == left
    assert spent([(STEP, taken)], delta=1e-5, accountant="rdp") <= 2.0
    assert spent([(STEP, taken + 1)], delta=1e-5, accountant="rdp") > 2.0
    assert not monitor.fits(STEP)
    with pytest.raises(BudgetSpent, match=r"would exceed epsilon 2 at delta 1e-05; .* is spent"):
        monitor.take(STEP)
    assert monitor.fits(Mechanism(noise_multiplier=50.0, sample_rate=0.001)), "a cheaper step still fits"
    assert monitor.remaining(STEP) == 0


def test_the_monitor_by_the_default_accountant_goes_to_the_calibrated_step() -> None:
    monitor = Monitor(Budget(epsilon=3.0, delta=1e-5), before=[(STEP, 2650)])
    assert drain(monitor, STEP) == 16
    assert monitor.spent <= 3.0


def test_a_step_costs_the_monitor_few_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    excess = Budget.excess

    def counted(self: Budget, phases: list[Phase]) -> float:
        asked.append(1)
        return excess(self, phases)

    monkeypatch.setattr(Budget, "excess", counted)
    assert drain(Monitor(Budget(epsilon=8.0, delta=1e-5, accountant="rdp")), STEP) > 10_000
    assert len(asked) < 60


def test_a_noise_that_changes_at_every_step_keeps_the_budget() -> None:
    monitor = Monitor(Budget(epsilon=1.0, delta=1e-5, accountant="rdp"))
    schedule = [Mechanism(noise_multiplier=3.0 * 0.98**step, sample_rate=0.05) for step in range(200)]
    taken = drain(monitor, *schedule, most=len(schedule))
    assert 30 < taken < 200
    assert 0.9 < spent([(step, 1) for step in schedule[:taken]], delta=1e-5, accountant="rdp") <= 1.0


def test_the_monitor_books_in_a_ledger_and_restarts_share_the_budget(tmp_path: Path) -> None:
    path, taken = tmp_path / "ledger.jsonl", 0
    for most in (300, 400, 100_000):
        with Ledger(path, block=16) as ledger:
            taken += drain(Monitor(RDP, ledger=ledger), STEP, most=most)
            assert sum(phase.steps for phase in read_ledger(path)) >= taken
        assert sum(phase.steps for phase in read_ledger(path)) == taken
    assert taken == Monitor(RDP).remaining(STEP)


def test_a_change_of_noise_returns_the_block_before_the_budget_is_asked(tmp_path: Path) -> None:
    room = Monitor(RDP).remaining(STEP)
    with Ledger(tmp_path / "ledger.jsonl", block=room) as ledger:
        monitor = Monitor(RDP, ledger=ledger)
        monitor.take(STEP)
        assert monitor.phases[0].steps == room
        monitor.take(Mechanism(noise_multiplier=1.1, sample_rate=0.01))


def test_a_resumed_run_repeats_its_steps_though_the_budget_is_spent(tmp_path: Path) -> None:
    path, ends = tmp_path / "ledger.jsonl", []
    for begin in (0, 30):
        with Ledger(path, run="a") as ledger:
            monitor = Monitor(RDP, before=[(STEP, 700)], ledger=ledger)
            ends.append(begin + drain(monitor, STEP, first=begin))
        assert sum(phase.steps for phase in read_ledger(path)) == ends[-1]
    assert ends[0] == ends[1] > 100


def test_a_monitor_refuses_what_its_accountant_cannot_serve() -> None:
    fixed = Mechanism(noise_multiplier=1.0, sample_rate=0.01, sampling="fixed")
    with pytest.raises(ConfigError, match="pld cannot serve fixed"):
        Monitor(Budget(epsilon=1.0, delta=1e-5)).take(fixed)
    with pytest.raises(ConfigError, match="cannot be composed"):
        Monitor(RDP, before=[(STEP, 1)]).fits(fixed)
    assert not Monitor(RDP).fits(Mechanism(noise_multiplier=0.0, sample_rate=0.01))


def test_shuffled_steps_of_one_epoch_cost_once_also_when_they_are_watched_one_by_one(tmp_path: Path) -> None:
    step = Mechanism(noise_multiplier=6.0, sample_rate=0.1, sampling="shuffled")
    budget = Budget(epsilon=2.0, delta=1e-5, accountant="rdp")
    whole = calibrate(
        target_epsilon=2.0,
        delta=1e-5,
        noise_multiplier=6.0,
        sample_rate=0.1,
        sampling="shuffled",
        accountant="rdp",
    )
    assert whole.steps % 10 == 0
    assert drain(Monitor(budget), step) == whole.steps
    path = tmp_path / "ledger.jsonl"
    with Ledger(path) as ledger:
        assert drain(Monitor(budget, ledger=ledger), step, most=15) == 15
    with Ledger(path) as ledger:  # a restart deals the records anew
        assert drain(Monitor(budget, ledger=ledger), step) == whole.steps - 20
