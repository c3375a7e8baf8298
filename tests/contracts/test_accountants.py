"""Every accountant: the same laws for each row of the registry and each sampling scheme that it can serve."""

from __future__ import annotations

import math

import pytest

from robust.defenses.privacy import Mechanism, epsilon, spent
from robust.defenses.privacy.accountants import REGISTRY, get
from robust.defenses.privacy.accounting import SAMPLINGS
from robust.errors import ConfigError

pytest.importorskip("dp_accounting", reason="accountants need the extra `privacy`")
pytest.importorskip("opacus", reason="the accountant prv needs the extra `privacy`")

SERVED = [(name, sampling) for name in REGISTRY for sampling in get(name).samplings]
BASE = {"noise_multiplier": 1.5, "sample_rate": 0.05, "steps": 100, "delta": 1e-5}


@pytest.mark.parametrize(("name", "sampling"), SERVED)
def test_epsilon_rises_with_steps_and_rate_and_falls_with_noise_and_delta(name: str, sampling: str) -> None:
    base = epsilon(**BASE, accountant=name, sampling=sampling)
    riskier = [{"steps": 300}, {"noise_multiplier": 1.0}, {"delta": 1e-7}]
    # zCDP does not see the rate of the sampling.
    riskier += [{"sample_rate": 0.1}] if name != "zcdp" or sampling == "shuffled" else []
    for change in riskier:
        other = epsilon(**BASE | change, accountant=name, sampling=sampling)
        assert base < other < math.inf, change


@pytest.mark.parametrize(("name", "sampling"), SERVED)
def test_a_number_says_what_it_assumes(name: str, sampling: str) -> None:
    value = epsilon(**BASE, accountant=name, sampling=sampling)
    assert isinstance(value, float)
    about = value.about
    assert (about.accountant, about.sampling, about.delta) == (name, sampling, 1e-5)
    words = "\n".join(about.assumptions)
    for topic in ("sampling ", "neighbours: ", "accountant: ", "conversion: ", "composition: ", "noise: "):
        assert f"\n{topic}" in f"\n{words}"
    assert "restart" in words
    assert "secret" in words
    assert about.guaranteed == (name != "gdp")
    assert ("approximation" in words) == (name == "gdp")
    assert ("earns nothing" in words) == (name == "zcdp" and sampling != "shuffled")
    assert value.to_dict()["epsilon"] == float(value)


@pytest.mark.parametrize(("name", "sampling"), SERVED)
def test_edge_cases(name: str, sampling: str) -> None:
    for change in ({"steps": 0}, {"sample_rate": 0.0}, {"noise_multiplier": math.inf}):
        assert epsilon(**BASE | change, accountant=name, sampling=sampling) == 0.0, change
    assert epsilon(**BASE | {"noise_multiplier": 0.0}, accountant=name, sampling=sampling) == math.inf
    assert spent([], delta=1e-5, accountant=name) == 0.0


@pytest.mark.parametrize(("name", "sampling"), SERVED)
def test_a_phase_in_pieces_is_the_same_phase(name: str, sampling: str) -> None:
    step = Mechanism(noise_multiplier=1.5, sample_rate=0.05, sampling=sampling)
    whole = spent([(step, 100)], delta=1e-5, accountant=name)
    pieces = spent([(step, 30), (step, 70)], delta=1e-5, accountant=name)
    assert pieces == whole
    louder = Mechanism(noise_multiplier=3.0, sample_rate=0.05, sampling=sampling)
    changed = spent([(step, 40), (louder, 60)], delta=1e-5, accountant=name)
    assert spent([(louder, 100)], delta=1e-5, accountant=name) < changed < whole


@pytest.mark.parametrize("name", list(REGISTRY))
@pytest.mark.parametrize("sampling", list(SAMPLINGS))
def test_what_an_accountant_cannot_serve_is_refused_in_one_line(name: str, sampling: str) -> None:
    if (name, sampling) in SERVED:
        return
    with pytest.raises(
        ConfigError, match=f"accountant {name} cannot serve {sampling} batches: .*; rdp"
    ) as caught:
        epsilon(**BASE, accountant=name, sampling=sampling)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in REGISTRY if get(name).guaranteed])
def test_a_guarantee_is_never_below_the_exact_gaussian(name: str) -> None:
    # Full batches are one Gaussian mechanism, whose epsilon the default accountant has in closed form.
    for sigma, steps in ((20.0, 1), (5.0, 10), (2.0, 30)):
        exact = epsilon(noise_multiplier=sigma, sample_rate=1.0, steps=steps, delta=1e-5)
        value = epsilon(noise_multiplier=sigma, sample_rate=1.0, steps=steps, delta=1e-5, accountant=name)
        assert exact * (1 - 1e-9) <= value <= 1.2 * exact
