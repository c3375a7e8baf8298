"""Calibration: the noise, the sample rate or the number of steps that a budget allows, never over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from robust.defenses.privacy.accountants.base import Unanswered
from robust.defenses.privacy.accounting import Epsilon, Mechanism, Phase, PhaseLike, serving, spent
from robust.errors import ConfigError

PRECISION = 3e-4  # relative, of noise and rate
# The range of what is solved for, from the most private end to the least, and where the search begins.
RANGE = {"noise_multiplier": (1e5, 1e-4), "sample_rate": (1e-9, 1.0), "steps": (1.0, 1e8)}
START = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 1024.0}


@dataclass(frozen=True)
class Calibration:
    """A setting that keeps a budget.

    Attributes:
        mechanism: with the noise and the rate to train with; steps: how many of it.
        solved: which of "noise_multiplier", "sample_rate" and "steps" was found.
        epsilon: what it costs, at most the target: evaluated at this very setting.
    """

    mechanism: Mechanism
    steps: int
    solved: str
    epsilon: Epsilon

    @property
    def value(self) -> float:
        """The number that was found."""
        return float(self.steps if self.solved == "steps" else getattr(self.mechanism, self.solved))


@dataclass(frozen=True, kw_only=True)
class Budget:
    """An (epsilon, delta) to keep, by an accountant whose number is a guarantee.

    Args:
        epsilon: positive and finite. delta: in (0, 1). accountant: any but "gdp", which may understate.

    Raises:
        ConfigError, UnknownName: an impossible budget.
    """

    epsilon: float
    delta: float
    accountant: str = "pld"

    def __post_init__(self) -> None:
        from robust.defenses.privacy.accountants import REGISTRY, get

        if not 0 < self.epsilon < math.inf:
            raise ConfigError(
                f"a budget of epsilon {self.epsilon:g} keeps nothing; give a positive number such as 3"
            )
        if not 0 < self.delta < 1:
            raise ConfigError(
                f"delta={self.delta:g} is no probability in (0, 1); give one below 1 / records, such as 1e-5"
            )
        if not get(self.accountant).guaranteed:
            sound = [name for name in REGISTRY if get(name).guaranteed]
            raise ConfigError(
                f"accountant {self.accountant} may understate, so it keeps no budget; {', '.join(sound)} do"
            )

    def cost(self, phases: Sequence[PhaseLike]) -> Epsilon:
        """What the phases cost by this budget's accountant."""
        return spent(phases, delta=self.delta, accountant=self.accountant)

    def excess(self, phases: Sequence[PhaseLike]) -> float:
        """The logarithm of the phases' epsilon over this one: at most 0 if they keep it.

        It is inf where the epsilon is too large for the accountant to compute.
        """
        try:
            cost = float(self.cost(phases))
        except Unanswered:
            return math.inf
        return math.log(cost / self.epsilon) if cost > 0 else -math.inf

    def keeps(self, phases: Sequence[PhaseLike]) -> bool:
        """Whether the phases cost at most this budget."""
        return self.excess(phases) <= 0


def require_served(accountant: str, phases: Sequence[PhaseLike]) -> None:
    """Raises `ConfigError` where an accountant cannot serve the phases at all, however small their epsilon."""
    from robust.defenses.privacy.accountants import get

    for mechanism, *_ in phases:
        if mechanism.sampling not in get(accountant).samplings:
            can = ", ".join(serving(mechanism.sampling, guaranteed=True))
            raise ConfigError(
                f"accountant {accountant} cannot serve {mechanism.sampling} batches: {get(accountant).refusal}; "
                f"{can} can"
            )
    spent([(mechanism, 0) for mechanism, *_ in phases], delta=0.5, accountant=accountant)


def calibrate(
    *,
    target_epsilon: float,
    delta: float,
    noise_multiplier: float | None = None,
    sample_rate: float | None = None,
    steps: int | None = None,
    accountant: str = "pld",
    sampling: str = "poisson",
    noise_over: str = "sensitivity",
    count_noise: float | None = None,
    before: Sequence[PhaseLike] = (),
) -> Calibration:
    """The one of noise, rate and steps that is left out: the least noise, the highest rate or the most steps in budget.

    Guarantee: the epsilon of the setting returned was evaluated, and is at most the target. Noise and rate are found to
    three parts in ten thousand, steps exactly.

    Args:
        target_epsilon, delta, accountant: the budget; the other options are those of `epsilon`.
        before: what was spent already on the same data.

    Raises:
        ConfigError: not exactly one is left out, or nothing keeps the budget.
    """
    budget = Budget(epsilon=target_epsilon, delta=delta, accountant=accountant)
    given = {"noise_multiplier": noise_multiplier, "sample_rate": sample_rate, "steps": steps}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) != 1:
        raise ConfigError(
            "calibration finds one of noise_multiplier, sample_rate and steps; give the other two"
        )
    solved = missing[0]
    if steps is not None and (steps != int(steps) or steps < 1):
        raise ConfigError(f"steps={steps!r} is no training; give a whole number such as 1000")

    def phases(value: float) -> tuple[list[PhaseLike], Mechanism, int]:
        mechanism = Mechanism(
            noise_multiplier=value if noise_multiplier is None else noise_multiplier,
            sample_rate=value if sample_rate is None else sample_rate,
            sampling=sampling, noise_over=noise_over, count_noise=count_noise,
        )  # fmt: skip
        count = int(value) if steps is None else int(steps)
        return [*before, Phase(mechanism, count, fresh=True)], mechanism, count

    require_served(accountant, phases(1)[0])
    if not budget.keeps(before):
        raise ConfigError(f"what was spent before is already over epsilon {target_epsilon:g}")
    start = START[solved]
    # rdp is cheap, and tells the numerical ones where to look.
    for name in ("rdp", accountant) if accountant in {"pld", "prv"} else (accountant,):
        by = replace(budget, accountant=name)
        start = least_private(lambda v, by=by: by.excess(phases(v)[0]), solved, start) or start  # type: ignore[misc]
    chosen, mechanism, count = phases(start)
    cost = budget.cost(chosen)
    if cost > budget.epsilon:
        raise ConfigError(_hopeless(solved, budget))
    return Calibration(mechanism, count, solved, cost)


def _hopeless(solved: str, budget: Budget) -> str:
    what = {
        "noise_multiplier": "no noise up to 100,000 keeps",
        "sample_rate": "no sample rate down to 1e-9 keeps",
        "steps": "not even one step keeps",
    }[solved]
    hint = "fewer steps" if solved == "noise_multiplier" else "more noise"
    return (
        f"{what} epsilon {budget.epsilon:g} at delta {budget.delta:g} by {budget.accountant}; take {hint} or a larger "
        "epsilon"
    )


def least_private(excess: Callable[[float], float], solved: str, start: float) -> float:
    """The value with the least privacy among those in budget, 0 where there is none.

    Args:
        excess: at most 0 for a value that keeps the budget; monotone: falling with the noise, rising with rate and
        steps.
        solved: "noise_multiplier", "sample_rate" or "steps", which says what range and precision are meant.
        start: where to look first; steps are whole.
    """
    safest, riskiest = RANGE[solved]
    whole, up = solved == "steps", riskiest > safest

    def move(value: float, factor: float) -> float:
        moved = value * factor if up else value / factor
        moved = math.ceil(moved) if whole and factor > 1 else math.floor(moved) if whole else moved
        return min(max(moved, min(safest, riskiest)), max(safest, riskiest))

    good, bad = start, start
    at_good = at_bad = excess(start)
    factor = 1.25
    while at_good > 0:
        if good == safest:
            return 0.0
        bad, at_bad = good, at_good
        good, factor = move(good, 1 / factor), factor**2
        at_good = excess(good)
    while at_bad <= 0:
        if bad == riskiest:
            return bad
        good, at_good = bad, at_bad
        bad, factor = move(bad, factor), factor**2
        at_bad = excess(bad)
    return _narrow(excess, (good, at_good), (bad, at_bad), whole)


def _narrow(
    excess: Callable[[float], float], good: tuple[float, float], bad: tuple[float, float], whole: bool
) -> float:
    """The good end of a bracket that is narrowed to the precision.

    By secants in the logarithms through the two values nearest the budget; every fourth time by the middle, should
    epsilon not be smooth. A secant goes a little beyond, to the side where the last one did not fall, so that both ends
    close in.
    """
    seen, turn = [good, bad], 0
    while abs(good[0] - bad[0]) > 1 if whole else abs(math.log(good[0] / bad[0])) > PRECISION:
        low, high = math.log(good[0]), math.log(bad[0])
        turn += 1
        (x0, f0), (x1, f1) = ((math.log(x), f) for x, f in sorted(seen, key=lambda item: abs(item[1]))[:2])
        if math.isfinite(f1) and f0 != f1 and turn % 4:
            root = x0 - f0 * (x1 - x0) / (f1 - f0)
            slack = max(0.3 / good[0] if whole else PRECISION / 3, 0.1 * abs(root - x0))
            root += math.copysign(slack, high - low if f0 <= 0 else low - high)
            middle = min(max(root, min(low, high) + slack / 9), max(low, high) - slack / 9)
        else:
            middle = (low + high) / 2
        value = math.exp(middle)
        if whole:
            value = float(min(max(round(value), good[0] + 1), bad[0] - 1))
        seen.append((value, excess(value)))
        good, bad = (seen[-1], bad) if seen[-1][1] <= 0 else (good, seen[-1])
    return good[0]
