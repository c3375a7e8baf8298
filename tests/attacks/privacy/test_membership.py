"""Membership attacks against closed forms, their papers' definitions written out naively, and scipy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from robust import Oracle
from robust.attacks.privacy import get
from robust.attacks.privacy import lira as lira_module
from robust.attacks.privacy.lira import deviation_from_out, log_likelihood_ratio, moments
from robust.attacks.privacy.rmia import marginal
from robust.attacks.privacy.signals import (
    log_odds,
    negative_entropy,
    negative_modified_entropy,
    probability,
    scaled,
    taylor,
)
from robust.attacks.privacy.threshold import best_threshold, class_thresholds
from robust.errors import DataError, ModelError, RobustError
from robust.membership import VIEWS, Evidence, References, as_logits, halves, viewed
from robust.roc import roc
from tests.attacks.privacy.membership_parts import MODELS, N, samples, subject


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- signals -------------------------------------------------------------------------------------------------------


def test_signals_equal_their_formulas() -> None:
    logits, y = 3 * drawn(50, 7), torch.arange(50) % 7
    p = torch.softmax(logits, 1).numpy()
    own = p[np.arange(50), y]
    entropy = -(p * np.log(p)).sum(1)
    modified = -(1 - own) * np.log(own)
    for i in range(50):
        modified[i] -= sum(p[i, c] * math.log(1 - p[i, c]) for c in range(7) if c != y[i])
    assert negative_entropy(logits, y).numpy() == pytest.approx(-entropy, rel=1e-9)
    assert negative_modified_entropy(logits, y).numpy() == pytest.approx(-modified, rel=1e-9)
    assert scaled(logits, y).numpy() == pytest.approx(np.log(own / (1 - own)), rel=1e-9)
    assert log_odds(logits).numpy() == pytest.approx(np.log(p / (1 - p)), rel=1e-9)
    z = logits.numpy() / 2

    def power(v: Any) -> Any:
        return 1 + v + v**2 / 2 + v**3 / 6 + v**4 / 24

    for i in range(50):
        top = power(z[i, y[i]] - 0.6)
        rest = sum(power(z[i, c]) for c in range(7) if c != y[i])
        assert float(taylor(logits, y)[i]) == pytest.approx(top / (top + rest), rel=1e-9)


@pytest.mark.parametrize("size", [40.0, 300.0, 3000.0])
def test_signals_keep_their_order_where_probabilities_round_to_one(size: float) -> None:
    logits = torch.tensor([[size, 0.0, 0.0], [2 * size, 0.0, 0.0], [0.0, size, 0.0], [0.0, 2 * size, 0.0]])
    y = torch.zeros(4, dtype=torch.int64)
    for signal in (scaled, negative_modified_entropy):
        found = signal(logits, y)
        assert bool(found.isfinite().all())
    right, surer, wrong, worse = scaled(logits, y).tolist()
    assert worse < wrong < 0 < right < surer
    assert scaled(logits[:1], y[:1]).item() == pytest.approx(size - math.log(2), rel=1e-12)


# -- LiRA ----------------------------------------------------------------------------------------------------------


def gaussians(models: int, n: int, apart: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """φ of a target and of models, normal with deviation 2 around a level of the sample's own, `apart` more if in."""
    inside = halves(n, models, seed=1)
    members = halves(n, 1, seed=2)[0]
    level = 5 * drawn(n, seed=3)
    values = level + 2 * drawn(models, n, seed=4) + apart * inside
    own = level + 2 * drawn(n, seed=5) + apart * members
    return own, values, inside, members


def test_the_likelihood_ratio_equals_scipys() -> None:
    own, values, inside, _ = gaussians(12, 30, 3.0)
    found = log_likelihood_ratio(own, values, inside)
    for i in range(30):
        within, out = values[inside[:, i], i].numpy(), values[~inside[:, i], i].numpy()
        by_scipy = stats.norm.logpdf(own[i], within.mean(), within.std(ddof=1)) - stats.norm.logpdf(
            own[i], out.mean(), out.std(ddof=1)
        )
        assert float(found[i]) == pytest.approx(by_scipy, rel=1e-9)
        tail = stats.norm.cdf(float(deviation_from_out(own, values, inside)[i]))
        assert tail == pytest.approx(1 - stats.norm.sf(own[i], out.mean(), out.std(ddof=1)), rel=1e-9)


@pytest.mark.parametrize("per_example", [True, False])
def test_the_roc_of_lira_on_gaussians_is_the_analytic_one(per_example: bool) -> None:
    apart, d = 3.0, 1.5
    own, values, inside, members = gaussians(300, 12_000, apart)
    for rule in (log_likelihood_ratio, deviation_from_out):  # with equal variances both order samples alike
        found = rule(own, values, inside, per_example)
        curve = roc(found[~members].numpy(), found[members].numpy())
        assert curve.auc == pytest.approx(stats.norm.cdf(d / math.sqrt(2)), abs=0.01)
        for rate in (0.02, 0.1):
            assert curve.tpr_at(rate) == pytest.approx(stats.norm.cdf(d + stats.norm.ppf(rate)), abs=0.03)


def test_a_fixed_variance_is_pooled_around_each_samples_mean() -> None:
    _, values, inside, _ = gaussians(20, 500, 1.0)
    mean, deviation = moments(values, inside, per_example=False)
    residuals = (values - mean)[inside]
    assert float(deviation[0]) == pytest.approx(math.sqrt(float((residuals**2).sum()) / (500 * 9)))
    assert float(deviation[0]) == pytest.approx(2.0, rel=0.03)
    alone, spread = moments(values[:2], inside[:2], per_example=False)  # one model in each: nothing to pool
    assert float(spread[0]) == pytest.approx(float(alone.std(correction=0)))


def test_queries_of_lira_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    target, x, y, _, references = subject()
    evidence = Evidence(target, x, y, references)
    one = get("lira-offline")(variance="fixed").run(evidence)
    two = get("lira-offline")(variance="fixed", queries=2).run(evidence)
    monkeypatch.setattr(lira_module, "scaled", scaled)
    mirrored = Evidence(target, x.flip(3), y, references)
    assert torch.allclose(two, (one + get("lira-offline")(variance="fixed").run(mirrored)) / 2)


# -- RMIA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_rmia_equals_the_papers_double_loop(mode: str, gamma: float) -> None:
    target, x, y, _, references = subject()
    x, y = x[:60], y[:60]
    few = References(references.models, references.inside[:, :60])
    found = get("rmia")(mode=mode, gamma=gamma, a=0.4, references=4)(target, x, y, references=few)
    chances = [probability(references.models[k].logits(x), y).numpy() for k in range(4)]
    own = probability(target.logits(x), y).numpy()

    def marginal_of(i: int) -> float:
        out = np.mean([chances[k][i] for k in range(4) if not few.inside[k, i]])
        if mode == "offline":
            return float(((1 + 0.4) * out + (1 - 0.4)) / 2)
        within = np.mean([chances[k][i] for k in range(4) if few.inside[k, i]])
        return float((out + within) / 2)

    ratios = [own[i] / marginal_of(i) for i in range(60)]
    for i in range(60):
        wins = sum(ratios[i] / ratios[j] >= gamma for j in range(60) if j != i)
        itself = gamma == 1  # the sample is one of the population
        assert float(found[i]) == pytest.approx((wins + itself) / 60)


def test_rmia_takes_a_population_of_its_own() -> None:
    target, x, y, members, references = subject()
    all_x, all_y = samples()
    evidence = Evidence(target, x, y, references, population=(all_x[N:], all_y[N:]))
    found = get("rmia")(a=0.4).run(evidence)
    own = probability(target.logits(x), y)
    ratio = own / marginal(
        torch.stack([probability(m.logits(x), y) for m in references.models]), references.inside, 0.4
    )
    z = torch.stack([probability(m.logits(all_x[N:]), all_y[N:]) for m in references.models])
    others = probability(target.logits(all_x[N:]), all_y[N:]) / ((1.4 * z.mean(0) + 0.6) / 2)
    assert torch.allclose(found, (ratio[:, None] / others[None] >= 1.0).double().mean(1))
    assert roc(found[~members].numpy(), found[members].numpy()).interval[0] > 0.5


def test_the_offline_slope_is_chosen_on_reference_models() -> None:
    target, x, y, _, references = subject()
    evidence = Evidence(target, x, y, references)
    chosen = get("rmia")().run(evidence)
    known = [get("rmia")(a=k / 10).run(evidence) for k in range(11)]
    assert any(torch.equal(chosen, one) for one in known)
    few = get("rmia")(references=2)
    assert torch.equal(few.run(evidence), get("rmia")(references=2, a=0.3).run(evidence))


# -- thresholds, labels, designs -------------------------------------------------------------------------------------


def test_the_best_threshold_is_the_best_of_all() -> None:
    members, others = drawn(40, seed=1) + 1, drawn(60, seed=2)
    found = best_threshold(members, others)

    def gain(level: float) -> float:
        return float((members >= level).double().mean() - (others >= level).double().mean())

    assert gain(found) == max(gain(float(level)) for level in torch.cat([members, others]))


def test_classes_get_thresholds_of_their_own() -> None:
    y = torch.arange(200) % 2
    inside = halves(200, 4, seed=0)
    values = drawn(4, 200) + 6 * inside + 100 * y  # class 1 is higher by 100, members by 6
    found = class_thresholds(values, inside, y)
    assert 0 < float(found[0]) < 6.5
    assert 100 < float(found[1]) < 106.5
    target, x, labels, members, references = subject()
    by_class = get("modified-entropy")(thresholds="class")(target, x, labels, references=references)
    assert roc(by_class[~members].numpy(), by_class[members].numpy()).interval[0] > 0.5


def test_labels_alone_tell_right_from_wrong_and_near_from_far() -> None:
    target, x, y, _, _ = subject()
    right = target.logits(x).argmax(1) == y
    oracle = Oracle(target, answers="labels")
    assert torch.equal(get("label-only-gap")()(oracle, x, y), right.double())
    distance = get("label-only-boundary")(queries=60)(oracle, x, y)
    assert bool((distance[~right] == 0).all())
    assert bool((distance[right] > 0).all())
    views = get("label-only-boundary")(by="augmentation")(oracle, x, y)
    by_hand = torch.stack([target.logits(viewed(x, k)).argmax(1) == y for k in range(18)]).double().mean(0)
    assert torch.allclose(views, by_hand)
    noisy = get("label-only-boundary")(by="noise", queries=10, sigma=1e-6)(oracle, x, y)
    assert float((noisy == right.double()).double().mean()) > 0.98


def test_views_are_the_image_its_mirror_and_both_shifted_by_a_pixel() -> None:
    x = torch.arange(18.0).view(1, 2, 3, 3) + 1
    assert len(VIEWS) == len({tuple(viewed(x, k).flatten().tolist()) for k in range(18)}) == 18
    assert torch.equal(viewed(x, 0), x)
    assert torch.equal(viewed(x, 1), x.flip(3))
    place = VIEWS.index((False, 1, 0))
    assert torch.equal(viewed(x, place)[:, :, 1:], x[:, :, :-1])
    assert float(viewed(x, place)[:, :, 0].abs().max()) == 0


def test_every_sample_is_in_half_of_the_models_and_no_model_depends_on_their_number() -> None:
    inside = halves(101, 8, seed=5)
    assert torch.equal(inside.sum(0), torch.full((101,), 4))
    assert {int(k) for k in inside.sum(1)} == {50, 51}
    assert torch.equal(halves(101, 3, seed=5), inside[:3])
    assert not torch.equal(halves(101, 8, seed=6), inside)


def test_probabilities_become_logits_and_answers_are_asked_for_once() -> None:
    logits = 3 * drawn(20, 5).float()
    assert torch.allclose(as_logits(logits.softmax(1)).softmax(1), logits.softmax(1), atol=1e-6)
    assert torch.equal(as_logits(logits), logits)
    target, x, y, _, _ = subject()
    evidence = Evidence(target, x, y)
    before = target.cost.forwards
    for name in ("loss", "entropy", "confidence", "label-only-gap"):
        get(name)().run(evidence)
    assert target.cost.forwards - before == N


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (
            lambda: get("lira-online")(references=1),
            "references=1 is too few for lira-online; give at least 2",
        ),
        (lambda: get("lira-online")(queries=19), "queries=19: a sample is asked about in 1 to 18 views"),
        (lambda: get("lira-online")(variance="big"), "variance='big' is unknown"),
        (lambda: get("rmia")(gamma=0.5), "gamma is at least 1"),
        (lambda: get("rmia")(a=1.5), "a in"),
        (lambda: get("rmia")(mode="x"), "mode='x' is unknown"),
        (lambda: get("loss")(thresholds="many"), "thresholds='many' is unknown"),
        (lambda: get("confidence")(of="all"), "of='all' is unknown"),
        (lambda: get("label-only-boundary")(by="luck"), "by='luck' is unknown"),
        (lambda: get("learned")(learner="svm"), "learner='svm'"),
        (lambda: get("shadow")(epochs=0), "must be positive"),
    ],
)
def test_a_hyper_parameter_that_makes_no_sense_is_one_line(make: Any, line: str) -> None:
    with pytest.raises(RobustError, match=line) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_evidence_that_does_not_fit_is_one_line() -> None:
    target, x, y, _, references = subject()
    with pytest.raises(DataError, match="give bool"):
        References(references.models[:3], references.inside)
    with pytest.raises(DataError, match=f"inside tells of {N} samples, and there are 10"):
        Evidence(target, x[:10], y[:10], references)
    lone = References(references.models[:3], references.inside[:3])
    with pytest.raises(RobustError, match="all 3 reference models; give an even number"):
        get("lira-online")(variance="fixed")(
            target, x, y, references=References(lone.models, torch.ones(3, N, dtype=torch.bool))
        )
    with pytest.raises(RobustError, match="say variance='fixed'"):
        get("lira-online")(variance="per-example", references=2)(target, x, y, references=references)
    broken = Oracle(lambda points: torch.full((len(points), 10), math.nan))
    with pytest.raises(ModelError, match="target-0 answers NaN"):
        get("loss")()(broken, x, y)
    assert len(references.models) == MODELS
