"""Epsilons against figures of the papers' methods, closed forms and independent computations."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from robust.defenses.privacy import Mechanism, Phase, epsilon, spent
from robust.defenses.privacy.accountants.base import thin
from robust.defenses.privacy.accounting import Term, compose
from robust.errors import ConfigError, UnknownName

pytest.importorskip("dp_accounting", reason="accountants need the extra `privacy`")
pytest.importorskip("opacus", reason="the accountant prv needs the extra `privacy`")


def analytic(mu: float, delta: float) -> float:
    """The Gaussian mechanism's epsilon at noise 1/mu, straight from Balle and Wang 2018, Theorem 8."""

    def excess(eps: float) -> float:
        tail = np.exp(eps + stats.norm.logcdf(-eps / mu - mu / 2))
        return float(stats.norm.cdf(mu / 2 - eps / mu) - tail - delta)

    return float(optimize.brentq(excess, 0.0, 5 * mu**2 + 10 * mu + 1, xtol=1e-12))


@pytest.mark.parametrize(("name", "figure"), [("pld", 1.828), ("prv", 1.838), ("rdp", 2.101)])
def test_the_known_figures_at_sigma_1(name: str, figure: float) -> None:
    value = epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=1000, delta=1e-5, accountant=name)
    assert value == pytest.approx(figure, rel=0.005)


def test_fixed_batches_without_replacement() -> None:
    value = epsilon(
        noise_multiplier=1.0,
        sample_rate=100 / 10_000,
        steps=1000,
        delta=1e-5,
        accountant="rdp",
        sampling="fixed",
    )
    assert value == pytest.approx(3.576, rel=0.005)
    assert value.about.neighbours == "one record replaced by any other"


def test_noise_over_the_clipping_norm_is_half_as_much_where_a_record_is_replaced() -> None:
    setting = {"sample_rate": 0.01, "steps": 100, "delta": 1e-5, "accountant": "rdp"}
    over_clip = epsilon(noise_multiplier=2.0, sampling="fixed", noise_over="clip", **setting)
    assert over_clip == epsilon(noise_multiplier=1.0, sampling="fixed", **setting)
    assert "2C" in over_clip.statement
    poisson = epsilon(noise_multiplier=2.0, noise_over="clip", **setting)
    assert poisson == epsilon(noise_multiplier=2.0, **setting)


@pytest.mark.parametrize(
    ("sigma", "steps", "delta"), [(1.0, 1, 1e-5), (4.0, 100, 1e-6), (30.0, 10, 1e-5), (0.5, 20, 1e-7)]
)
def test_full_batches_equal_the_analytic_gaussian_mechanism(sigma: float, steps: int, delta: float) -> None:
    exact = analytic(math.sqrt(steps) / sigma, delta)
    setting = {"noise_multiplier": sigma, "sample_rate": 1.0, "steps": steps, "delta": delta}
    for name in ("pld", "gdp"):
        assert epsilon(**setting, accountant=name) == pytest.approx(exact, rel=1e-6)
    assert exact <= epsilon(**setting, accountant="prv") <= exact + 0.02


def test_the_numerical_composition_also_equals_it() -> None:
    from robust.defenses.privacy.accountants.pld import composed

    numerical = composed((Term(4.0, 1.0, 100),), 1e-4).get_epsilon_for_delta(1e-5)
    assert numerical == pytest.approx(analytic(2.5, 1e-5), rel=1e-4)


def test_one_poisson_step_equals_its_hockey_stick_divergence() -> None:
    sigma, rate, delta = 0.8, 0.3, 1e-5
    value = float(epsilon(noise_multiplier=sigma, sample_rate=rate, steps=1, delta=delta))
    # With the record the density is (1 - q) N(0) + q N(1). Removing it: that exceeds e^eps N(0) above `edge`. Adding it
    # is harmless here, as N(0) / ((1 - q) N(0) + q N(1)) is at most 1 / (1 - q) < e^eps.
    edge = sigma**2 * math.log((math.exp(value) - 1 + rate) / rate) + 0.5
    outside = (1 - rate - math.exp(value)) * stats.norm.sf(edge / sigma)
    removed = outside + rate * stats.norm.sf((edge - 1) / sigma)
    assert math.exp(value) > 1 / (1 - rate)
    assert 0.999 * delta < removed <= delta * (1 + 1e-9)


@pytest.mark.parametrize("order", [1.1, 1.7, 2.0, 3.5, 6.0])
def test_fractional_renyi_orders_equal_the_expectation(order: float) -> None:
    from robust.defenses.privacy.accountants.rdp import fractional

    sigma, rate = 0.7, 0.2
    exact = integrate.quad(
        lambda z: stats.norm.pdf(z, 0, sigma) * (1 - rate + rate * math.exp((2 * z - 1) / (2 * sigma**2))) ** order,
        -12, 20, limit=2000, points=[0, 2, 5],
    )[0]  # fmt: skip
    assert fractional(sigma, rate, order) == pytest.approx(math.log(exact) / (order - 1), rel=1e-8)


def test_zcdp_is_the_best_renyi_order_of_the_gaussian() -> None:
    rho, delta = 100 / (2 * 15.0**2), 1e-6
    orders = np.linspace(1.001, 200, 2_000_000)
    bounds = orders * rho + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)
    value = epsilon(noise_multiplier=15.0, sample_rate=0.001, steps=100, delta=delta, accountant="zcdp")
    assert value == pytest.approx(bounds.min(), rel=1e-8)


def test_gdp_is_the_limit_of_the_papers_and_understates_here() -> None:
    setting = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 1000, "delta": 1e-5}
    poisson = epsilon(**setting, accountant="gdp")
    assert poisson == pytest.approx(analytic(0.01 * math.sqrt(1000 * (math.e - 1)), 1e-5), rel=1e-6)
    assert poisson < 0.9 * epsilon(**setting), "which is why it keeps no budget"
    moment = math.e * stats.norm.cdf(1.5) + 3 * stats.norm.cdf(-0.5) - 2
    fixed = epsilon(**setting, accountant="gdp", sampling="fixed")
    assert fixed == pytest.approx(analytic(0.01 * math.sqrt(2 * 1000 * moment), 1e-5), rel=1e-6)


def test_shuffled_epochs_compose_in_parallel_within_and_as_gaussians_across() -> None:
    for steps, epochs in ((1, 1), (100, 1), (101, 2), (1000, 10)):
        value = epsilon(noise_multiplier=2.0, sample_rate=0.01, steps=steps, delta=1e-5, sampling="shuffled")
        assert value == pytest.approx(analytic(math.sqrt(epochs) / 2.0, 1e-5), rel=1e-6)
    amplified = epsilon(noise_multiplier=2.0, sample_rate=0.01, steps=1000, delta=1e-5)
    assert value > 5 * amplified


def shuffled(sigma: float, rate: float = 0.1) -> Mechanism:
    return Mechanism(noise_multiplier=sigma, sample_rate=rate, sampling="shuffled")


def test_a_shuffled_epoch_counts_with_its_least_noise_and_a_restart_begins_a_new_one() -> None:
    def terms(*phases: tuple[Mechanism, int] | Phase) -> dict[float, int]:
        return {term.sigma: term.steps for term in compose(phases).terms}

    assert terms((shuffled(2.0), 5), (shuffled(1.0), 5)) == {1.0: 1}
    assert terms((shuffled(1.0), 15), (shuffled(2.0), 15)) == {1.0: 2, 2.0: 1}
    assert terms((shuffled(1.0), 5), (shuffled(1.0), 5)) == {1.0: 1}
    assert terms((shuffled(1.0), 5), Phase(shuffled(1.0), 5, fresh=True)) == {1.0: 2}
    assert terms((shuffled(1.0), 10), (shuffled(1.0, 0.05), 20)) == {1.0: 2}
    with pytest.raises(ConfigError, match="within an epoch"):
        terms((shuffled(1.0), 5), (shuffled(1.0, 0.05), 20))
    with pytest.raises(ConfigError, match="1 / batches"):
        terms((shuffled(1.0, 0.3), 5), (shuffled(2.0, 0.3), 20))


def test_the_noisy_count_of_adaptive_clipping_is_accounted() -> None:
    # Andrew et al. 2021: gradients noised by (z^-2 - (2 b)^-2)^(-1/2), together with the count, cost what z costs.
    z, b = 1.1, 5.0
    split = (z**-2 - (2 * b) ** -2) ** -0.5
    step = Mechanism(noise_multiplier=split, sample_rate=0.01, count_noise=b)
    assert step.sigma == pytest.approx(z)
    assert Mechanism(noise_multiplier=split, sample_rate=0.01).sigma > z
    assert "noisy count" in spent([(step, 10)], delta=1e-5, accountant="rdp").statement
    assert Mechanism(noise_multiplier=1.0, count_noise=0.0).sigma == 0
    # Replaced records move the sum by 2C and the count by 1: both noises count half.
    fixed = Mechanism(noise_multiplier=split, sampling="fixed", noise_over="clip", count_noise=b)
    assert fixed.sigma == pytest.approx(z / 2)


def test_a_schedule_of_many_noises_is_bounded_from_above_and_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robust.defenses.privacy.accountants.rdp.MOST", 24)
    noises = np.geomspace(1.3, 1.0, 36)
    phases = [(Mechanism(noise_multiplier=s, sample_rate=0.01), 10) for s in noises]
    value = spent(phases, delta=1e-5, accountant="rdp")
    from robust.defenses.privacy.accountants.rdp import _moments, _orders

    bounds = sum(10 * _moments(float(s), 0.01, False) for s in noises)
    orders = np.array(_orders())
    exact = (bounds + np.log1p(-1 / orders) - np.log(1e-5 * orders) / (orders - 1)).min()
    assert exact <= value <= 1.03 * exact
    assert "36 different steps" in value.statement


def test_thinned_terms_are_never_more_private_than_those_they_stand_for() -> None:
    terms = tuple(Term(1 + i / 100, 0.01 + i / 1e5, i + 1) for i in range(100))
    few, notes = thin(terms, 10)
    assert len(few) <= 10
    assert sum(term.steps for term in few) == sum(term.steps for term in terms)
    for term in terms:
        assert any(one.sigma <= term.sigma and one.rate >= term.rate for one in few)
    assert notes
    assert thin(few, 10) == (few, ())


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"sample_rate": 1.5}, "sample_rate=1.5"),
        ({"sample_rate": math.nan}, "sample_rate=nan"),
        ({"steps": -1}, "-1 is no number of steps"),
        ({"steps": 1.5}, "1.5 is no number of steps"),
        ({"delta": 0.0}, "delta=0"),
        ({"delta": 1.0}, "delta=1"),
        ({"delta": math.nan}, "delta=nan"),
        ({"sampling": "poison"}, "did you mean poisson"),
        ({"noise_over": "norm"}, "sensitivity"),
        ({"count_noise": -1.0}, "count_noise=-1"),
    ],
)
def test_a_value_out_of_range_is_one_line(change: dict[str, float], line: str) -> None:
    setting = {"noise_multiplier": 1.0, "sample_rate": 0.01, "steps": 10, "delta": 1e-5} | change
    with pytest.raises(ConfigError, match=line) as caught:
        epsilon(**setting)
    assert "\n" not in str(caught.value)


def test_unknown_accountants_and_mixed_samplings_are_refused() -> None:
    with pytest.raises(UnknownName, match="pld"):
        epsilon(noise_multiplier=1.0, sample_rate=0.01, steps=1, delta=1e-5, accountant="pldd")
    mixed = [(Mechanism(noise_multiplier=1.0), 1), (shuffled(1.0), 1)]
    with pytest.raises(ConfigError, match="cannot be composed"):
        spent(mixed, delta=1e-5)


@pytest.mark.parametrize("name", ["pld", "prv"])
def test_an_epsilon_too_large_to_compute_is_refused_not_guessed(name: str) -> None:
    with pytest.raises(ConfigError, match=f"accountant {name} stops at"):
        epsilon(noise_multiplier=0.1, sample_rate=0.5, steps=1000, delta=1e-5, accountant=name)
    loose = epsilon(noise_multiplier=0.1, sample_rate=0.5, steps=1000, delta=1e-5, accountant="rdp")
    assert 1000 < loose < math.inf


@pytest.mark.parametrize("rate", [1e-2, 1e-6, 1e-9, 1e-12])
def test_tiny_rates_do_not_round_to_perfect_privacy(rate: float) -> None:
    from robust.defenses.privacy.accountants.rdp import _moments, _orders

    # At order 2 the divergence is log(1 + q^2 (exp(1 / sigma^2) - 1)); no order above it may be less.
    exact = math.log1p(rate**2 * math.expm1(4.0))
    moments = _moments(0.5, rate, False)[[order >= 2 for order in _orders()]]
    assert (moments >= exact).all()
    assert moments[0] <= exact + 2e-14


def test_an_epsilon_survives_copies_and_json() -> None:
    value = epsilon(noise_multiplier=1.0, sample_rate=1.0, steps=1, delta=1e-5)
    for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert (twin, twin.about) == (value, value.about)
    assert json.loads(json.dumps({"epsilon": value})) == {"epsilon": float(value)}


def test_neither_library_is_imported_before_an_accountant_needs_it(root: Path) -> None:
    code = (
        "import sys, robust.defenses.privacy as p\n"
        "assert not {'dp_accounting', 'opacus'} & set(sys.modules)\n"
        "sys.modules['dp_accounting'] = None\n"
        "try: p.epsilon(noise_multiplier=1.0, sample_rate=0.1, steps=1, delta=1e-5)\n"
        "except p.LedgerError.__mro__[2] as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("pip install 'robust-toolkit[privacy]'")
