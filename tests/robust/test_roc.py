"""ROC curves against scikit-learn, thresholds against their definition, intervals against simulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from robust.detector import threshold_at
from robust.errors import RobustError
from robust.roc import roc


@pytest.mark.parametrize("ties", [False, True])
def test_curve_and_area_are_scikit_learn_s(ties: bool) -> None:
    generator = np.random.default_rng(3)
    clean, adversarial = generator.normal(0, 1, 80), generator.normal(0.8, 1.3, 50)
    if ties:
        clean, adversarial = clean.round(), adversarial.round()
    labels = np.r_[np.zeros(80), np.ones(50)]
    found = roc(clean, adversarial)
    fpr, tpr, _ = roc_curve(labels, np.r_[clean, adversarial], drop_intermediate=False)
    assert np.allclose(found.fpr, fpr)
    assert np.allclose(found.tpr, tpr)
    assert found.auc == pytest.approx(roc_auc_score(labels, np.r_[clean, adversarial]))
    for rate in (0.0, 0.01, 0.05, 0.3, 1.0):
        assert found.tpr_at(rate) == tpr[fpr <= rate].max()
    thin = np.array(found.thinned(20))
    assert len(thin) <= 24
    assert thin[0].tolist() == [0, 0]
    assert thin[-1].tolist() == [1, 1]
    assert {tuple(row) for row in thin} <= {(round(a, 6), round(b, 6)) for a, b in zip(fpr, tpr, strict=True)}


def test_infinite_scores_are_scores_and_what_is_none_is_refused() -> None:
    found = roc([0.0, -np.inf, 1.0], [np.inf, 0.5])
    assert found.auc == pytest.approx((3 + 2) / 6)
    assert roc([0.0, 1.0], [2.0, 3.0]).auc == 1
    assert roc([0.0, 1.0], [-2.0, -3.0]).auc == 0
    for bad in (([], [1.0]), ([1.0], []), ([np.nan], [1.0])):
        with pytest.raises(RobustError):
            roc(*bad)


def test_the_interval_covers_the_true_area_about_as_often_as_it_says() -> None:
    true = stats.norm.cdf(1 / np.sqrt(2))
    generator, covered, trials = np.random.default_rng(5), 0, 400
    for _ in range(trials):
        low, high = roc(generator.normal(0, 1, 60), generator.normal(1, 1, 60)).interval
        covered += low <= true <= high
    assert stats.binom.cdf(covered, trials, 0.92) > 1e-3
    assert covered < trials
    low, high = roc(np.arange(100.0), np.arange(100.0, 200.0)).interval
    assert (low, high) == (0.97, 1.0)


def test_a_threshold_is_an_order_statistic_and_bounds_the_rate_of_fresh_scores() -> None:
    scores = torch.arange(99.0).flip(0)
    assert threshold_at(scores, 0.05) == 94  # the 95th smallest of 99: 4 of them lie above
    assert threshold_at(scores, 0.01) == 98
    for n, fpr in ((18, 0.05), (98, 0.01)):
        with pytest.raises(RobustError, match=f"at least {n + 1}"):
            threshold_at(torch.zeros(n), fpr)
    for fpr in (0.0, 1.0, float("nan")):
        with pytest.raises(RobustError, match="no false-positive rate"):
            threshold_at(scores, fpr)
    generator = np.random.default_rng(7)
    flagged = [
        float((generator.normal(size=50) > threshold_at(torch.from_numpy(generator.normal(size=39)), 0.1)).mean())
        for _ in range(2000)
    ]  # fmt: skip
    assert np.mean(flagged) == pytest.approx(0.1, abs=4 * np.std(flagged) / np.sqrt(2000))
