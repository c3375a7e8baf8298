"""Randomised smoothing against closed forms and scipy: exact radii, exact confidence, keyed noise, abstention."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.defenses.certified import RandomizedSmoothing
from robust.defenses.certified.binomial import Array, Plan, least, lower_bound
from robust.defenses.certified.noises import NOISES
from robust.errors import ModelError, RobustError
from tests.defenses.certified_parts import distances, hyperplane


def test_the_bound_is_scipy_s() -> None:
    for n, alpha in ((1, 0.05), (100, 0.001), (10_000, 0.001)):
        k = np.unique(np.linspace(0, n, 23).astype(int))
        expected = [stats.binomtest(int(a), n, alternative="greater").proportion_ci(1 - alpha).low for a in k]
        assert lower_bound(k, n, alpha) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("probability", [0.5, 0.8413, 0.9772, 0.99999999])
def test_the_fewest_successes_are_the_fewest(probability: float) -> None:
    k = least(1000, probability, 0.001)
    assert k > 1000 or lower_bound(k, 1000, 0.001) > probability
    assert not lower_bound(k - 1, 1000, 0.001) > probability


def test_a_linear_classifier_s_radius_is_its_distance_and_never_more() -> None:
    """Smoothing does not move the hyperplane of two classes, whatever sigma."""
    clf, x, slope, offset = hyperplane()
    y, exact = distances(x, slope, offset, 2.0)
    for sigma in (0.1, 0.5):
        classes, radii = RandomizedSmoothing(clf, sigma=sigma).certify(x, n=4000)
        sure = classes >= 0
        assert bool((classes[sure] == y[sure]).all())
        assert bool((radii <= exact).all())
        # What 4,000 votes can show at all, and what is lost to the bound in the middle of the curve.
        near = (exact > 0.3 * sigma) & (exact < 2 * sigma)
        assert int(near.sum()) >= 2
        assert bool((radii[near] > exact[near] - 0.25 * sigma).all())


@pytest.mark.parametrize("noise", ["laplace", "uniform"])
def test_the_l1_radius_is_below_the_distance(noise: str) -> None:
    clf, x, slope, offset = hyperplane()
    _, exact = distances(x, slope, offset, float("inf"))
    certificate = RandomizedSmoothing(clf, sigma=0.5, noise=noise)
    _classes, radii = certificate.certify(x, n=2000)
    assert certificate.norm == "l1"
    assert bool((radii <= exact).all())
    assert int((radii > 0).sum()) >= 5


def test_the_probability_is_the_radius_s_inverse_and_the_noise_has_its_sigma_and_shape() -> None:
    shapes = {"gaussian": stats.norm(scale=0.3), "laplace": stats.laplace(scale=0.3 / 2**0.5)}
    shapes["uniform"] = stats.uniform(-0.3 * 3**0.5, 0.6 * 3**0.5)
    for name, noise in NOISES.items():
        for radius in (0.0, 0.1, 0.4):
            p = noise.probability(radius, 0.3)
            assert float(noise.radius(np.array(p), 0.3)) == pytest.approx(radius, abs=1e-9)
        drawn = noise.add(
            torch.zeros(2, 1000), 0.3, torch.tensor([0, 9]), torch.tensor([0, 0]), 0, "test", 4
        ).flatten()
        assert stats.kstest(drawn.numpy(), shapes[name].cdf).pvalue > 1e-3
        assert stats.kstest(drawn.numpy() * 1.5, shapes[name].cdf).pvalue < 1e-9


def test_every_sample_is_what_scipy_makes_of_its_counts() -> None:
    clf, x, *_ = hyperplane(classes=4)
    for row in RandomizedSmoothing(clf, sigma=0.4).records(x, n0=30, n=500, alpha=0.01):
        votes = {int(k): v for k, v in row["votes"].items()}
        chosen = max(row["selection"], key=lambda k: (row["selection"][k], -int(k)))
        assert (sum(votes.values()), sum(row["selection"].values())) == (500, 30)
        assert row["chosen"] == int(chosen)
        k = votes.get(row["chosen"], 0)
        bound = stats.beta.ppf(0.01, k, 500 - k + 1) if k else 0.0
        assert row["lower"] == pytest.approx(bound, rel=1e-9)
        if bound > 0.5:
            assert (row["class"], row["radius"]) == (
                row["chosen"],
                pytest.approx(0.4 * stats.norm.ppf(bound)),
            )
        else:
            assert (row["class"], row["radius"]) == (-1, 0.0)


def test_a_point_on_the_border_abstains_and_nan_votes_for_nobody() -> None:
    class Border(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = x.flatten(1)[:, 0] - 0.5
            logits = torch.stack([first, -first], 1)
            return torch.where(x.flatten(1)[:, 1:2] > 0.5, torch.nan, logits)

    clf = Classifier(Border().eval())
    x = torch.tensor([[0.5, 0.0], [0.9, 0.5], [0.9, 0.0]]).view(3, 1, 1, 2)
    certificate = RandomizedSmoothing(clf, sigma=0.05)
    classes, radii = certificate.certify(x, n=1000)
    assert classes.tolist() == [-1, -1, 0]
    assert radii[:2].tolist() == [0.0, 0.0]
    assert certificate.predict(x, n=200).tolist() == [-1, 0, 0]
    assert certificate.predict(x[:0]).shape == (0,)
    assert certificate.certify(x[:0])[1].shape == (0,)


def test_a_vote_depends_on_seed_and_sample_and_on_nothing_else() -> None:
    clf, x, *_ = hyperplane(classes=4)
    settings: dict[str, Any] = {"n0": 20, "n": 150}
    whole = RandomizedSmoothing(clf, sigma=0.4).records(x, **settings)
    assert RandomizedSmoothing(clf, sigma=0.4, batch=7).records(x, **settings) == whole
    part = RandomizedSmoothing(clf, sigma=0.4).records(x[4:6], index=torch.tensor([4, 5]), **settings)
    assert part == whole[4:6]
    assert RandomizedSmoothing(clf, sigma=0.4, seed=1).records(x, **settings) != whole
    moved = RandomizedSmoothing(clf, sigma=0.4).records(x[4:6], **settings)
    assert moved != part


def test_sequential_votes_are_the_fixed_ones_begun() -> None:
    clf, x, *_ = hyperplane(classes=4)
    certificate = RandomizedSmoothing(clf, sigma=0.4)
    found = certificate.records(x, n=3000, radii=[0.2], sequential=True)
    fixed = certificate.records(x, n=3000)
    target = NOISES["gaussian"].probability(0.2, 0.4)
    assert sum(row["n"] for row in found) < 3000 * len(x) / 2
    for row, whole in zip(found, fixed, strict=True):
        assert row["selection"] == whole["selection"]
        assert all(row["votes"][k] <= whole["votes"][k] for k in row["votes"])
        assert sum(row["votes"].values()) == row["n"]
        assert (row["radius"] > 0.2) == (row["lower"] > target)


# -- the sequential plan on votes of known probability ---------------------------------------------------------

ALPHA, MOST = 0.001, 10_000
TARGETS = (0.5, float(stats.norm.cdf(1)), float(stats.norm.cdf(2)))  # radius 0, sigma and twice sigma


def votes(p: Array, seed: int = 0) -> Any:
    """A source of votes that fall for the class with probability p, a row each."""
    generator = np.random.default_rng(seed)
    return lambda rows, first, copies: generator.binomial(copies, p[rows])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("alpha", [0.001, 0.05])
def test_a_probability_at_the_threshold_is_certified_no_more_often_than_alpha(
    target: float, alpha: float
) -> None:
    p = np.full(10_000, target)
    wrong = int((Plan(TARGETS, MOST, alpha).run(votes(p), len(p)).lower > p).sum())
    assert stats.binomtest(wrong, len(p), alpha, alternative="greater").pvalue > 0.01, wrong
    if alpha == 0.05:  # and the bounds are not empty words
        assert wrong > 0.2 * alpha * len(p)


def test_over_probabilities_of_all_kinds_no_bound_is_above_the_truth_more_often_than_alpha() -> None:
    p = np.random.default_rng(1).uniform(0.3, 1.0, 10_000)
    found = Plan(TARGETS, MOST, ALPHA).run(votes(p), len(p))
    assert int((found.lower > p).sum()) <= stats.binom.isf(0.01, len(p), ALPHA)
    assert int((found.shown & (p[:, None] <= np.array(TARGETS))).any(1).sum()) <= 10


def mixtures() -> dict[str, Array]:
    """Probabilities as smoothed networks have them (heaped at 1), spread evenly, and spread over the targets."""
    generator = np.random.default_rng(2)
    return {
        "network": generator.beta(3.0, 0.25, 10_000),
        "even": generator.uniform(0.0, 1.0, 10_000),
        "upper": generator.uniform(0.6, 1.0, 10_000),
    }


@pytest.mark.parametrize("name", list(mixtures()))
def test_it_takes_a_third_of_the_votes_and_abstains_hardly_more_often(name: str) -> None:
    p = mixtures()[name]
    found = Plan(TARGETS, MOST, ALPHA).run(votes(p), len(p))
    fixed = lower_bound(votes(p, 1)(np.arange(len(p)), 0, MOST), MOST, ALPHA)
    assert found.used.mean() <= MOST / 3
    lost = (fixed[:, None] > np.array(TARGETS)).mean(0) - found.shown.mean(0)
    assert bool((lost <= 0.02).all()), lost


def test_what_every_look_spends_adds_up_and_one_look_spends_all() -> None:
    for n in (1, 50, 64, 65, 100, 10_000, 100_000):
        plan = Plan(TARGETS, n, ALPHA)
        assert sum(plan.shares) == pytest.approx(ALPHA)
        assert plan.looks[-1] == n
        assert list(plan.looks) == sorted(set(plan.looks))
    assert Plan(TARGETS, 50, ALPHA).shares == (ALPHA,)


def test_a_plan_bound_by_few_votes_is_the_fixed_bound() -> None:
    p = np.array([0.2, 0.9, 1.0])
    plan = Plan((0.5,), 60, 0.01)
    found = plan.run(votes(p), 3)
    assert found.used.tolist() == [60, 60, 60]
    assert found.lower == pytest.approx(lower_bound(found.successes, 60, 0.01))


# -- who votes ---------------------------------------------------------------------------------------------------


def test_the_certificate_says_which_model_voted() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)
        )
    clf, x = Classifier(module.eval()), torch.rand(3, 1, 6, 6)
    said = {
        precision: RandomizedSmoothing(clf, precision=precision).records(x, n=64)[0]["voter"]  # type: ignore[arg-type]
        for precision in ("float32", "original", "bfloat16")
    }
    assert said == {
        "float32": "float32, its folded twin",
        "original": "float32, the original",
        "bfloat16": "bfloat16, its folded twin",
    }
    ours = RandomizedSmoothing(clf).records(x, n=500)
    theirs = RandomizedSmoothing(clf, precision="original").records(x, n=500)
    for mine, other in zip(ours, theirs, strict=True):
        assert sum(abs(mine["votes"].get(k, 0) - v) for k, v in other["votes"].items()) <= 4


def test_a_model_that_draws_by_itself_is_refused() -> None:
    class Drawing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1) + torch.randn_like(x.flatten(1))

    with pytest.warns(UserWarning, match="randomised"), pytest.raises(ModelError, match="draws by itself"):
        RandomizedSmoothing(Classifier(Drawing().eval())).certify(torch.rand(4, 1, 1, 3))


@pytest.mark.parametrize(
    ("fields", "settings", "line"),
    [
        ({"sigma": 0.0}, {}, "sigma=0.0 is no noise"),
        ({"noise": "gausian"}, {}, "did you mean gaussian"),
        ({"precision": "float16"}, {}, "did you mean"),
        ({"batch": 0}, {}, "batch=0"),
        ({}, {"n": 0}, "n=0 votes"),
        ({}, {"n0": 0}, "n0=0 votes"),
        ({}, {"alpha": 1.0}, "alpha=1.0"),
        ({}, {"radii": [float("nan")]}, "radius=nan"),
    ],
)
def test_what_cannot_be_certified_is_one_line(
    fields: dict[str, Any], settings: dict[str, Any], line: str
) -> None:
    clf, x, *_ = hyperplane()
    with pytest.raises(RobustError, match=line) as caught:
        RandomizedSmoothing(clf, **fields).certify(x, **settings)
    assert "\n" not in str(caught.value)
