"""What a differentially private training releases, and the epsilon it costs, with every assumption in words.

A *mechanism* is one step: a clipped sum over a batch plus Gaussian noise. A *phase* is a mechanism and how often it was
taken. `epsilon` answers for one phase, `spent` for a list of them: noise or rate that change, adaptive clipping,
restarts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from robust.errors import ConfigError
from robust.registry import unknown

# Sampling schemes: how a batch comes about, whom the guarantee compares, and the sensitivity of a sum clipped at C,
# in C.
SAMPLINGS: Mapping[str, tuple[str, str, int]] = {
    "poisson": (
        "Poisson: every record joins every batch by a coin of its own that falls with the sample rate, and empty or "
        "large batches are taken as they fall",
        "one record added or removed",
        1,
    ),
    "fixed": (
        "fixed: every step draws a batch of fixed size afresh, without replacement",
        "one record replaced by any other",
        2,
    ),
    "shuffled": (
        "shuffled: an epoch deals the records into disjoint batches, so every step is counted at full strength and the "
        "steps of one epoch in parallel, with no amplification",
        "one record replaced by one that contributes nothing",
        1,
    ),
}
NOISE_OVER = ("sensitivity", "clip")


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One step of a private training: a clipped sum over a sampled batch, plus Gaussian noise (Abadi et al. 2016).

    Args:
        noise_multiplier: the noise's standard deviation in the unit of `noise_over`; 0 is no privacy, inf no release.
        sample_rate: the (expected) share of the records in a batch, in [0, 1].
        sampling: "poisson", "fixed" (fixed-size batches drawn afresh each step) or "shuffled" (epochs).
        noise_over: "sensitivity", of the sum under the sampling's neighbours, or "clip", the clipping norm C. They
            differ for "fixed", where replacing a record moves a clipped sum by up to 2C.
        count_noise: standard deviation of the noise on the count of gradients below the norm, each counted as +-1/2,
            that adaptive quantile clipping releases in the same step (Andrew et al. 2021, arXiv:1905.03871).

    Raises:
        ConfigError: a value outside its range.
    """

    noise_multiplier: float
    sample_rate: float = 1.0
    sampling: str = "poisson"
    noise_over: str = "sensitivity"
    count_noise: float | None = None

    def __post_init__(self) -> None:
        if self.sampling not in SAMPLINGS:
            raise ConfigError(f"sampling: {unknown('sampling', self.sampling, list(SAMPLINGS))}")
        if self.noise_over not in NOISE_OVER:
            raise ConfigError(f"noise_over: {unknown('unit', self.noise_over, list(NOISE_OVER))}")
        for name in ("noise_multiplier", "count_noise"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(
                    f"{name}={value:g} is no standard deviation; give a positive number such as 1.0"
                )
        if not 0 <= self.sample_rate <= 1:
            raise ConfigError(
                f"sample_rate={self.sample_rate:g} is no share of the data; give one in (0, 1] such as 256/60000"
            )

    @property
    def sigma(self) -> float:
        """The whole step's noise over its sensitivity: sum and count together are one Gaussian mechanism.

        Andrew et al. 2021, Theorem 1: with sum noise z and count noise b, sigma is (z^-2 + (2 b)^-2)^(-1/2), as a count
        of +-1/2 has half the sensitivity of a sum clipped at 1; under replacement both sensitivities double.
        """
        factor = SAMPLINGS[self.sampling][2]
        parts = [self.noise_multiplier / (factor if self.noise_over == "clip" else 1)]
        parts += [] if self.count_noise is None else [2 * self.count_noise / factor]
        if min(parts) == 0:
            return 0.0
        return 1 / math.hypot(*(1 / part for part in parts)) if min(parts) < math.inf else math.inf

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, and noise and rate."""
        told: dict[str, Any] = {"noise_multiplier": self.noise_multiplier, "sample_rate": self.sample_rate}
        told |= {"sampling": self.sampling}
        told |= {} if self.noise_over == "sensitivity" else {"noise_over": self.noise_over}
        return told | ({} if self.count_noise is None else {"count_noise": self.count_noise})


class Phase(NamedTuple):
    """A mechanism and how many steps of it were taken; ``fresh`` says that a run, and so an epoch, begins here."""

    mechanism: Mechanism
    steps: int
    fresh: bool = False


PhaseLike = Phase | tuple[Mechanism, int]


class Term(NamedTuple):
    """`steps` Gaussian mechanisms with noise `sigma` (over the sensitivity) on a batch sampled at `rate`."""

    sigma: float
    rate: float
    steps: int


@dataclass(frozen=True)
class Composition:
    """What an accountant composes: distinct terms under one sampling scheme, in any order.

    Attributes:
        sampling: one of `SAMPLINGS`. Shuffled epochs are already Gaussian mechanisms at rate 1, one an epoch.
        terms: with finite positive noise, positive rates and counts; steps that release nothing are left out.
        leaking: some step has no noise.
        clip: some noise was given over the clipping norm; counted: some step releases a count as well.
        steps: all steps taken.
    """

    sampling: str
    terms: tuple[Term, ...]
    leaking: bool
    clip: bool
    counted: bool
    steps: int

    @property
    def full(self) -> bool:
        """Whether every step sees all records: then the composition is one Gaussian mechanism."""
        return all(term.rate == 1 for term in self.terms)

    @property
    def mu(self) -> float:
        """The root of the sum of 1/sigma^2 over all steps: the 1/sigma of full batches as one Gaussian."""
        return math.sqrt(math.fsum(term.steps / term.sigma**2 for term in self.terms))


@dataclass(frozen=True)
class Statement:
    """What an epsilon means: its delta, its accountant, and every assumption in words.

    Attributes:
        guaranteed: an upper bound, if the assumptions hold; False for an approximation, which may understate.
    """

    delta: float
    accountant: str
    sampling: str
    neighbours: str
    guaranteed: bool
    assumptions: tuple[str, ...]


class Epsilon(float):
    """An epsilon that knows its conditions: a float in every use, and `about` says what it assumes."""

    about: Statement

    def __new__(cls, value: float, about: Statement) -> Epsilon:
        """A float with its statement."""
        self = super().__new__(cls, value)
        self.about = about
        return self

    def __getnewargs__(self) -> tuple[Any, ...]:
        return float(self), self.about

    @property
    def statement(self) -> str:
        """The number and all its assumptions, as text of several lines."""
        kind = "at most" if self.about.guaranteed else "about"
        head = f"epsilon {kind} {float(self):.4g} at delta {self.about.delta:g} ({self.about.accountant})"
        return "\n- ".join([head, *self.about.assumptions])

    def to_dict(self) -> dict[str, Any]:
        """Number and statement, JSON-ready; an infinite epsilon is None."""
        about = self.about
        return {
            "epsilon": float(self) if math.isfinite(self) else None, "delta": about.delta,
            "accountant": about.accountant, "sampling": about.sampling, "neighbours": about.neighbours,
            "guaranteed": about.guaranteed, "assumptions": list(about.assumptions),
        }  # fmt: skip


def compose(phases: Iterable[PhaseLike]) -> Composition:
    """The distinct terms of a list of phases.

    Raises:
        ConfigError: counts that are no counts, or phases of several sampling schemes, whose neighbours differ.
    """
    listed = [Phase(*phase) for phase in phases]
    for phase in listed:
        if isinstance(phase.steps, bool) or phase.steps != int(phase.steps) or phase.steps < 0:
            raise ConfigError(f"{phase.steps!r} is no number of steps; give a whole number such as 1000")
    samplings = dict.fromkeys(phase.mechanism.sampling for phase in listed)
    if len(samplings) > 1:
        raise ConfigError(
            f"{' and '.join(samplings)} batches cannot be composed: their guarantees compare different neighbours"
        )
    sampling = next(iter(samplings), "poisson")
    taken = [phase for phase in listed if phase.steps and phase.mechanism.sample_rate]
    steps = _epochs(taken) if sampling == "shuffled" else [_term(phase) for phase in taken]
    found: dict[tuple[float, float], int] = {}
    for sigma, rate, count in steps:
        found[sigma, rate] = found.get((sigma, rate), 0) + count
    return Composition(
        sampling=sampling,
        terms=tuple(Term(s, q, n) for (s, q), n in found.items() if 0 < s < math.inf),
        leaking=any(s == 0 for s, _ in found),
        clip=any(phase.mechanism.noise_over == "clip" for phase in taken),
        counted=any(phase.mechanism.count_noise is not None for phase in taken),
        steps=sum(int(phase.steps) for phase in listed),
    )


def _term(phase: Phase) -> Term:
    return Term(phase.mechanism.sigma, float(phase.mechanism.sample_rate), int(phase.steps))


def _epochs(phases: list[Phase]) -> list[Term]:
    """Shuffled steps as epochs: a record is in one batch an epoch, at worst the one with the least noise.

    An epoch has floor(1 / rate) steps (as if the last small batch were dropped); a begun one counts as whole. Where the
    noise changes, the epochs must be where they are counted: 1 / rate is a whole number, and each begins with the run.
    """
    epochs: list[Term] = []
    left, before = 0, (math.inf, -1.0)  # steps left in the open epoch; noise and rate of the step before
    for mechanism, count, fresh in phases:
        sigma, rate, rest = mechanism.sigma, float(mechanism.sample_rate), int(count)
        length = max(1, math.floor(1 / rate + 1e-9))
        if fresh or not epochs:
            left = 0
        elif rate != before[1] and left:
            raise ConfigError(
                "the sample rate of shuffled batches changes within an epoch; change it when one ends"
            )
        elif sigma != before[0] and abs(1 / rate - length) > 1e-6 * length:
            raise ConfigError(
                f"shuffled batches whose noise changes need whole epochs; the sample rate is 1 / batches, not {rate:g}"
            )
        before = (sigma, rate)
        if left:  # the open epoch goes on
            epochs[-1] = Term(min(sigma, epochs[-1].sigma), 1.0, 1)
            done = min(left, rest)
            left, rest = left - done, rest - done
        whole, begun = divmod(rest, length)
        if whole:
            epochs.append(Term(sigma, 1.0, whole))
        if begun:
            left = length - begun
            epochs.append(Term(sigma, 1.0, 1))
    return epochs


def spent(phases: Iterable[PhaseLike], *, delta: float, accountant: str = "pld") -> Epsilon:
    """The epsilon at `delta` of all phases together, by one accountant.

    Guarantee: unless the accountant is "gdp", the training is (epsilon, delta)-differentially private for the
    neighbours of its sampling scheme, if the assumptions in ``about`` hold. Edge cases: no steps, a rate of 0 or
    infinite noise cost 0; a step without noise costs inf.

    Args:
        phases: mechanisms and their counts, all of one sampling scheme.
        delta: in (0, 1), well below one over the number of records.
        accountant: a name of `robust.defenses.privacy.accountants`.

    Raises:
        UnknownName: no such accountant. ConfigError: a value out of range, or a sampling scheme that it cannot serve.
    """
    from robust.defenses.privacy.accountants import get

    if not 0 < delta < 1:
        raise ConfigError(
            f"delta={delta:g} is no probability in (0, 1); give one below 1 / records, such as 1e-5"
        )
    chosen = get(accountant)()
    composition = compose(phases)
    if composition.sampling not in chosen.samplings:
        raise ConfigError(
            f"accountant {accountant} cannot serve {composition.sampling} batches: {chosen.refusal}; "
            f"{', '.join(serving(composition.sampling))} can"
        )
    notes: tuple[str, ...]
    if composition.leaking:
        value, notes = math.inf, ("a step without noise hides nothing",)
    elif not composition.terms:
        value, notes = 0.0, ("nothing was released",)
    else:
        value, notes = _answer(accountant, composition, delta)
    how, neighbours, factor = SAMPLINGS[composition.sampling]
    assumptions = (
        f"sampling {how}",
        f"neighbours: {neighbours}",
        *((_UNAMPLIFIED,) if chosen.unamplified and not composition.full else ()),
        _noise(composition, factor),
        f"accountant: {chosen.words}",
        *notes,
        f"composition: these {composition.steps:,} steps are all that the records were used for, over every run and "
        "restart; each further run or tuned hyper-parameter adds to them",
    )
    about = Statement(delta, accountant, composition.sampling, neighbours, chosen.guaranteed, assumptions)
    return Epsilon(float(value), about)


@lru_cache(maxsize=512)
def _answer(accountant: str, composition: Composition, delta: float) -> tuple[float, tuple[str, ...]]:
    """An accountant's answer; searches and monitors ask the same more than once, and it may take seconds."""
    from robust.defenses.privacy.accountants import get

    found: tuple[float, tuple[str, ...]] = get(accountant)().epsilon(composition, delta)
    return found


_UNAMPLIFIED = "the sampling earns nothing here: every step is counted as if it saw every record"


def serving(sampling: str, *, guaranteed: bool = False) -> list[str]:
    """The accountants that can serve a sampling scheme, or those of them whose number is a guarantee."""
    from robust.defenses.privacy.accountants import REGISTRY

    loaded = {name: REGISTRY.load(name) for name in REGISTRY}
    return [
        name
        for name, item in loaded.items()
        if sampling in item.samplings and (item.guaranteed or not guaranteed)
    ]


def _noise(composition: Composition, factor: int) -> str:
    if factor == 1:
        unit = "over the clipping norm C"
    elif composition.clip:
        unit = "over the clipping norm C, halved because replacing a record moves a clipped sum by up to 2C"
    else:
        unit = "over the sensitivity 2C of a clipped sum; for noise given over C say noise_over='clip'"
    counted = "; the noisy count of adaptive clipping is part of every step" if composition.counted else ""
    return f"noise: Gaussian, its standard deviation {unit}, from a seed or source that stays secret{counted}"


def epsilon(
    *,
    noise_multiplier: float,
    sample_rate: float,
    steps: int,
    delta: float,
    accountant: str = "pld",
    sampling: str = "poisson",
    noise_over: str = "sensitivity",
    count_noise: float | None = None,
) -> Epsilon:
    """The epsilon of `steps` equal steps of DP-SGD (Abadi et al. 2016, arXiv:1607.00133); see `spent` and `Mechanism`.

    >>> epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=1000, delta=1e-5)
    1.828...
    """
    mechanism = Mechanism(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, sampling=sampling, noise_over=noise_over,
        count_noise=count_noise,
    )  # fmt: skip
    return spent([(mechanism, steps)], delta=delta, accountant=accountant)
