"""Detectors against closed forms and independent computations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import jensenshannon, mahalanobis
from sklearn.covariance import EmpiricalCovariance
from torch import Tensor, nn

from robust import L2, Classifier, Linf, Oracle
from robust.attacks import get as attack
from robust.defenses import get
from robust.defenses.detection.blinding import Blinding
from robust.defenses.detection.combined import regression
from robust.defenses.detection.features import WIDEST, features, layers
from robust.defenses.detection.lid import dimensionality
from robust.defenses.detection.magnet import jensen_shannon
from robust.defenses.detection.mahalanobis import gaussians
from robust.defenses.detection.similarity import Banned
from robust.defenses.detection.squeezing import NonLocalMeans
from robust.detector import Fitted
from robust.errors import ModelError, RobustError
from robust.rng import Draws


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def halves(scale: float = 20.0) -> Classifier:
    """Two classes by the first pixel: the boundary is the plane x₀ = 0.5."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        module[1].weight.zero_()[0, 0] = scale
        module[1].bias.copy_(torch.tensor([-scale / 2, 0.0]))
    return Classifier(module.eval())


def test_mahalanobis_distances_are_scipy_s() -> None:
    values = torch.randn(300, 5, generator=generator(1)) @ torch.randn(5, 5, generator=generator(2))
    y = torch.arange(300) % 3
    values = values + 2 * y[:, None]
    means, factor = gaussians(values, y, ridge=1e-12)
    centred = torch.cat([values[y == k] - values[y == k].mean(0) for k in range(3)]).double().numpy()
    shared = EmpiricalCovariance(assume_centered=True).fit(centred)
    detector = get("mahalanobis")(layers=1)
    learnt = {"0/means": means, "0/factor": factor}
    points = torch.randn(7, 5, generator=generator(3))
    found = detector.number(learnt, 0, points)
    for point, distance in zip(points, found, strict=True):
        each = [
            mahalanobis(point.double().numpy(), mean.double().numpy(), shared.precision_) for mean in means
        ]
        assert float(distance) == pytest.approx(min(each) ** 2, rel=1e-4)


def test_a_feature_that_never_varies_has_an_inverse_too() -> None:
    values = torch.cat([torch.randn(50, 2, generator=generator(4)), torch.zeros(50, 1)], 1)
    means, factor = gaussians(values, torch.zeros(50, dtype=torch.long), ridge=1e-3)
    assert bool(factor.isfinite().all())
    lift = 1e-3 * float((values - values.mean(0)).square().mean(0).mean())
    precision = factor @ factor.T
    assert float(precision[2, 2]) == pytest.approx(1 / lift, rel=1e-3)
    assert means.shape == (1, 3)


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_the_estimated_dimension_is_that_of_a_ball(dimension: int) -> None:
    ball = torch.rand(4000, dimension, generator=generator(5)) * 2 - 1
    turned = ball @ torch.randn(dimension, 12, generator=generator(6))  # it lies in twelve dimensions
    centre = 0.2 * (torch.rand(200, dimension, generator=generator(7)) - 0.5)
    points = centre @ torch.randn(dimension, 12, generator=generator(6))
    found = dimensionality(points, turned, 100)
    # The mean of k − 1 exponentials over k, inverted: its expectation is d · k / (k − 2), its deviation d / √k.
    assert float(found.mean()) == pytest.approx(dimension * 100 / 98, rel=0.05 + 0.02 * dimension)
    assert float(found.std()) < 0.3 * dimension


def test_the_estimate_is_the_formula_and_passes_over_the_point_itself() -> None:
    references = torch.randn(30, 4, generator=generator(8))
    point = references[3:4]
    others = torch.cat([references[:3], references[4:]])
    radii = np.sort(np.linalg.norm((others - point).double().numpy(), axis=1))[:10]
    expected = -1 / np.mean(np.log(radii / radii[-1]))
    assert float(dimensionality(point, references, 10)) == pytest.approx(expected, rel=1e-4)
    same = dimensionality(point, point + torch.eye(4), 4)
    assert float(same) <= 1e4


def test_divergence_is_scipy_s() -> None:
    first, second = torch.randn(6, 9, generator=generator(9)), 3 * torch.randn(6, 9, generator=generator(10))
    found = jensen_shannon(first, second)
    for p, q, value in zip(first.softmax(1), second.softmax(1), found, strict=True):
        assert float(value) == pytest.approx(jensenshannon(p.numpy(), q.numpy()) ** 2, rel=1e-4)
    assert float(jensen_shannon(first, first).abs().max()) < 1e-6


def test_squeezing_is_the_largest_l1_distance_of_the_answers() -> None:
    clf, x = halves(2.0), torch.rand(5, 1, 2, 2, generator=generator(11))
    detector = get("feature-squeezing")(bits=1, median=0, search=0).fit(clf, x)
    plain, rounded = clf.logits(x).softmax(1), clf.logits((x >= 0.5).float()).softmax(1)
    assert torch.allclose(detector.score(x), (plain - rounded).abs().sum(1), atol=1e-6)


def test_non_local_means_is_its_definition() -> None:
    x = torch.rand(1, 2, 7, 7, generator=generator(12))
    search, patch, strength = 3, 3, 60.0
    found = NonLocalMeans(search=search, patch=patch, strength=strength).transform(x, (0.0, 1.0), 0)
    wide = F.pad(x, (2, 2, 2, 2), mode="reflect")[0]

    def window(row: int, column: int) -> Tensor:
        return wide[:, row + 1 : row + 4, column + 1 : column + 4]

    for row, column in ((0, 0), (3, 4), (6, 2)):
        total, weights = torch.zeros(2), 0.0
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                apart = float((window(row + dy, column + dx) - window(row, column)).square().mean())
                weight = np.exp(-apart / (strength / 255) ** 2)
                total += weight * wide[:, row + dy + 2, column + dx + 2]
                weights += weight
        assert torch.allclose(found[0, :, row, column], total / weights, atol=1e-5)
    weak = NonLocalMeans(search=3, strength=1e-3).transform(x, (0.0, 1.0), 0)
    assert torch.allclose(weak, x, atol=1e-6)


@pytest.mark.parametrize("away", [0.0, 0.1, 0.3])
def test_votes_near_a_plane_are_binomial_about_its_share_of_the_cube(away: float) -> None:
    x = torch.full((40, 1, 2, 2), 0.5)
    x[:, 0, 0, 0] += away
    detector = get("region")(radius=0.2, votes=200).fit(halves(), x)
    scores = detector.score(x)
    share = max(0.2 - away, 0) / 0.4
    assert float(scores.mean()) == pytest.approx(share, abs=4 * 0.5 / np.sqrt(40 * 200) + 1e-9)
    assert (len(scores.unique()) > 1) == (share > 0)
    again = detector.score(x, step=1)
    assert torch.equal(again, scores) == (share == 0), "another step draws anew"


def test_an_autoencoder_knows_what_it_learnt_from() -> None:
    coarse = torch.rand(200, 1, 3, 3, generator=generator(13))
    x = F.interpolate(coarse, (9, 9), mode="bilinear")
    module = nn.Sequential(nn.Flatten(), nn.Linear(81, 3)).eval()
    detector = get("magnet-error")(epochs=15, noise=0.02).fit(Classifier(module), x[:160])
    clean, noisy = (
        detector.score(x[160:]),
        detector.score((x[160:] + 0.2 * torch.sign(x[160:] - 0.5)).clamp(0, 1)),
    )
    assert float(clean.max()) < float(noisy.median())
    rebuilt = detector.detector.rebuilt(detector.clf, detector.learnt, x[:4])
    assert rebuilt.shape == (4, 1, 9, 9), "an odd side keeps its length"
    expected = (x[:4] - rebuilt).flatten(1).square().mean(1).sqrt()
    assert torch.allclose(detector.score(x[:4]), expected, atol=1e-6)


def test_the_layers_are_those_with_weights_in_the_order_of_calls() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.first = nn.Linear(3 * 900, 2), nn.Conv2d(1, 3, 3, padding=1)
            self.second = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.last(torch.relu(self.second(torch.relu(self.first(x)))).flatten(1))
            return logits

    net = Net().eval()
    clf, x = Classifier(net), torch.rand(3, 1, 30, 30)
    assert layers(clf, x, 9) == [net.second, net.last]
    assert layers(clf, x, 1) == [net.last]
    logits, found = features(clf, x, [net.second, net.last])
    assert torch.equal(logits, clf.logits(x))
    assert torch.allclose(found[0], torch.relu(net.first(x)).mean((2, 3)), atol=1e-6)
    assert found[1].shape == (3, WIDEST)

    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2]

    with pytest.raises(ModelError, match="no linear or convolutional layer"):
        get("lid")().fit(Classifier(Bare().eval()), torch.rand(40, 1, 2, 2))


def test_the_regression_finds_the_layer_that_tells_them_apart() -> None:
    negative = torch.randn(200, 3, generator=generator(14))
    positive = torch.randn(150, 3, generator=generator(15)) + torch.tensor([0.0, 3.0, 0.0])
    learnt = regression(negative, positive)
    weight = learnt["combined/weight"]
    assert float(weight[1]) > 5 * float(weight[[0, 2]].abs().max())


def similarity() -> tuple[Fitted, Tensor]:
    x = F.interpolate(torch.rand(260, 1, 4, 4, generator=generator(16)), (12, 12), mode="bilinear")
    module = nn.Sequential(nn.Flatten(), nn.Linear(144, 3)).eval()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        nn.init.normal_(module[1].weight)
    learnt = get("similarity")(neighbours=10, history=60, epochs=6).fit(Classifier(module), x[:100])
    return learnt.calibrated(x[100:200], 0.02), x[200:]


def test_queries_that_are_nearly_the_same_are_flagged_and_a_user_s_are_not() -> None:
    detector, fresh = similarity()
    guard = detector.detector.guard(detector)
    guard(fresh)
    assert len(guard.detections) <= 5, "of 60 at most 2 % on average"
    attacker = detector.detector.guard(detector)
    one = fresh[:1] + 0.01 * torch.randn(40, 1, 12, 12, generator=generator(17))
    attacker(one.clamp(0, 1))
    assert attacker.detections[0] == 11, "the first query with ten neighbours"
    assert attacker.detections == [11, 22, 33], "each detection empties the account's history"
    assert attacker.asked == 40
    direct = detector.score(fresh)
    assert bool((direct[:10] == -torch.inf).all())
    assert guard.scores[:40] == pytest.approx(direct[:40].tolist(), abs=1e-4) or guard.detections


@pytest.mark.parametrize("name", ["square", "nes", "hopskipjump"])
def test_an_attack_on_a_watched_account_is_flagged_and_banned(name: str) -> None:
    detector, fresh = similarity()
    clf, x = detector.clf, fresh[:1]
    y, kind = clf.logits(x).argmax(1), attack(name)
    answers = "labels" if kind.knowledge == "decision" else "scores"

    def run(ban: bool) -> None:
        guard = detector.detector.guard(detector, ban=ban)
        oracle = Oracle(guard, bounds=clf.bounds, classes=3, answers=answers)
        kind(threat=Linf(0.02), queries=150).run(oracle, x, y)
        assert guard.detections
        assert guard.detections[0] <= 100

    run(ban=False)
    with pytest.raises(Banned, match="banned after"):
        run(ban=True)


def test_blinded_queries_are_keyed_stay_in_the_box_and_differ() -> None:
    x = torch.rand(1, 3, 8, 8, generator=generator(18)).expand(5, -1, -1, -1) * 4 - 1
    draws = Draws(3, "blinding", torch.arange(5))
    found = Blinding()(x, (-1.0, 3.0), draws)
    assert torch.equal(found, Blinding()(x, (-1.0, 3.0), draws))
    assert float(found.min()) >= -1
    assert float(found.max()) <= 3
    assert len({row.numpy().tobytes() for row in found}) == 5
    still = Blinding(turn=0, shift=0, zoom=0, light=0, contrast=0, noise=0)
    assert torch.allclose(still(x, (-1.0, 3.0), draws), x, atol=1e-5)
    assert Blinding()(x[:0], (-1.0, 3.0), draws).shape == (0, 3, 8, 8)


class Watch:
    """A detector that flags whatever has moved to the right of a line, for a closed form."""

    randomised = False

    def __init__(self, line: float) -> None:
        self.threshold = line

    def score(
        self, x: Tensor, *, seed: int | None = None, index: Tensor | None = None, step: Tensor | int = 0
    ) -> Tensor:
        return x[:, 0, 0, 1]

    def flags(self, x: Tensor, *, index: Tensor | None = None) -> Tensor:
        return self.score(x) > self.threshold

    def describe(self) -> dict[str, float]:
        return {"line": self.threshold}


@pytest.mark.parametrize("method", ["selective", "orthogonal"])
@pytest.mark.parametrize("until", ["strongest", "broken"])
def test_success_is_a_wrong_class_that_is_not_flagged(method: str, until: str) -> None:
    """The class changes 0.2 away in one pixel, the flag is lowered 0.1 away in another: linf holds both."""
    clf = halves()
    x = torch.full((3, 1, 2, 2), 0.5)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = 0.7, 0.6
    y = torch.zeros(3, dtype=torch.long)
    kind = attack("detector-aware")
    for line, eps, possible in ((0.5, 0.25, True), (0.5, 0.19, False), (0.3, 0.25, False)):
        found = kind(
            threat=Linf(eps), detector=Watch(line), steps=40, method=method, until=until, restarts=1
        ).run(clf, x, y)
        assert bool(found.success.all()) == bool(found.success.any()) == possible, (line, eps)
        if eps > 0.2 and until == "strongest":
            assert bool((clf.logits(found.x_adv).argmax(1) == 1).all()), "wrong, though it is flagged"
    assert kind(threat=Linf(0.1), detector=Watch(0.5)).config()["detector"] == {"line": 0.5}


def test_a_wrong_clean_point_that_is_flagged_is_no_success_yet() -> None:
    clf = halves()
    x = torch.full((2, 1, 2, 2), 0.5)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = 0.2, torch.tensor([0.4, 0.6])
    found = attack("detector-aware")(threat=L2(0.3), detector=Watch(0.5), steps=20, until="broken").run(
        clf, x, torch.zeros(2, dtype=torch.long)
    )
    assert found.success.tolist() == [True, True]
    assert float(found.distance[0]) == 0
    assert float(found.x_adv[1, 0, 0, 1]) <= 0.5


def test_what_only_some_detectors_do_is_one_line_elsewhere() -> None:
    clf, x = halves(), torch.rand(30, 1, 2, 2)
    detector = get("feature-squeezing")(bits=1, median=0, search=0).fit(clf, x)
    with pytest.raises(RobustError, match="only a stateful detector"):
        detector.detector.guard(detector)
    with pytest.raises(RobustError, match="no queries to blind"):
        detector.detector.blinded(detector, (0.0, 1.0), 0)
    with pytest.raises(RobustError, match="search=13 reaches beyond"):
        get("feature-squeezing")(median=0).fit(clf, x)
    with pytest.raises(RobustError, match="makes no examples"):
        get("lid")(attack="square")
