"""The accountants' record: the page says what it says, the claims hold, and some settings come out again."""

from __future__ import annotations

import math

import pytest
from scipy import optimize, stats

from robust.digest import read_json
from robust.experiments.privacy import measure, page

pytest.importorskip("dp_accounting", reason="accountants need the extra `privacy`")
pytest.importorskip("opacus", reason="the accountant prv needs the extra `privacy`")

RECORD = read_json(page.RECORD)


def test_the_page_says_what_the_record_says() -> None:
    text = page.README.read_text(encoding="utf-8")
    assert page.PAGE.fill(text) == text


def test_the_record_has_fifty_settings() -> None:
    settings = {
        (row["noise_multiplier"], row["sample_rate"], row["steps"], row["delta"])
        for row in RECORD["settings"]
    }
    assert len(settings) == len(RECORD["settings"]) == 50


def test_both_libraries_agree_within_one_percent() -> None:
    for one, other in (("rdp", "opacus_rdp"), ("prv", "pld")):
        assert max(map(abs, page.apart(RECORD["settings"], one, other))) < 0.01


def test_pld_is_at_most_prv_and_prv_at_most_rdp_within_one_percent() -> None:
    for row in RECORD["settings"]:
        assert row["pld"] <= 1.01 * row["prv"]
        assert row["prv"] <= 1.01 * row["rdp"]
        assert row["rdp"] <= row["dp_accounting_rdp"] * (1 + 1e-9)


def test_full_batches_are_the_analytic_gaussian_mechanism() -> None:
    for row in RECORD["full"]:
        mu = math.sqrt(row["steps"]) / row["noise_multiplier"]

        def excess(eps: float, mu: float = mu, delta: float = row["delta"]) -> float:
            # Balle and Wang 2018, Theorem 8, divided by delta and with the second term as one exponential.
            second = math.exp(eps + stats.norm.logcdf(-eps / mu - mu / 2) - math.log(delta))
            return float(stats.norm.cdf(mu / 2 - eps / mu) / delta - second - 1)

        exact = optimize.brentq(excess, 0.0, 10 * mu + mu**2, xtol=1e-12)
        assert row["closed"] == pytest.approx(exact, rel=1e-6)
        assert row["grid"] == pytest.approx(exact, rel=1e-5)
        assert exact <= row["prv"] <= 1.01 * exact


@pytest.mark.parametrize("index", [4, 25, 48])
def test_a_setting_comes_out_again(index: int) -> None:
    row = RECORD["settings"][index]
    again = measure.setting(row["noise_multiplier"], row["sample_rate"], row["steps"], row["delta"])
    assert again.keys() == row.keys()
    for name, value in row.items():
        assert again[name] == pytest.approx(value, rel=1e-4), name


def test_fixed_batches_come_out_again() -> None:
    row = RECORD["fixed"][0]
    assert row["sensitivity"] == pytest.approx(3.576, rel=0.005)
    again = measure.fixed(row["noise_multiplier"], row["sample_rate"], row["steps"], row["delta"])
    assert again == pytest.approx(row, rel=1e-6)


def test_the_command_needs_to_know_where(capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main([]) == 2
    assert "usage" in capsys.readouterr().err
