"""IBP, CROWN and CLEVER: exact on linear networks, never crossed by an attack, CROWN never looser than IBP."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import PGD
from robust.classifier import Classifier
from robust.defenses.certified import CLEVER, CROWN, IBP
from robust.defenses.certified.bounds import Bounds
from robust.errors import ModelError, RobustError
from robust.threat import make_threat
from tests.defenses.certified_parts import distances, hyperplane, networks

DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}
RADII = {"linf": 0.03, "l2": 0.08, "l1": 0.15}
NETWORKS = list(networks())
CASES = [(IBP, "linf"), (CROWN, "linf"), (CROWN, "l2"), (CROWN, "l1")]
EVERY = pytest.mark.parametrize(("kind", "norm"), CASES, ids=[f"{k.name}-{n}" for k, n in CASES])


@EVERY
def test_on_a_linear_network_the_margin_is_exact(kind: type[Bounds], norm: str) -> None:
    clf, x, slope, offset = hyperplane(classes=4)
    x = 0.3 + 0.4 * x  # so that no ball leaves the box
    y, exact = distances(x, slope, offset, DUAL[norm])
    certificate = kind(clf, threat_norm=norm)
    eps = torch.minimum(exact, torch.tensor(0.25)) * 0.9
    logits = x.double().flatten(1) @ slope.T + offset
    gaps = logits.gather(1, y[:, None]) - logits
    steep = (slope[y][:, None] - slope[None]).norm(p=DUAL[norm], dim=2)
    expected = (gaps - eps[:, None] * steep).scatter(1, y[:, None], torch.inf).amin(1)
    assert torch.allclose(certificate.margins(x, y, eps), expected, atol=1e-6)
    _, radii = certificate.certify(x, radii=[0.25], steps=16)
    inside = exact < 0.25
    assert bool(inside.any())
    assert torch.allclose(radii[inside], exact[inside], rtol=1e-3, atol=1e-4)
    assert bool((radii <= exact + 1e-9).all())


def test_the_box_cuts_the_ball_in_linf() -> None:
    clf, x, slope, offset = hyperplane()
    y = (x.double().flatten(1) @ slope.T + offset).argmax(1)
    corner = torch.where((slope[y] - slope[1 - y]) > 0, 0.0, 1.0).double()  # the worst point of the whole box
    logits = corner @ slope.T + offset
    expected = (logits.gather(1, y[:, None]) - logits.gather(1, 1 - y[:, None]))[:, 0]
    for kind in (IBP, CROWN):
        assert torch.allclose(kind(clf).margins(x, y, 5.0), expected, atol=1e-6)


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize("name", NETWORKS)
def test_no_point_that_a_thousand_restarts_find_is_below_a_bound(name: str, norm: str) -> None:
    """All their points count, not only the best."""
    clf, x = networks()[name]
    x = x[:2]
    y, eps = clf.logits(x).argmax(1), RADII[norm]
    many, labels = x.repeat_interleave(1000, 0), y.repeat_interleave(1000)
    found = PGD(threat=make_threat(norm, eps), steps=4, step_size=eps / 2)(clf, many, labels)
    logits = clf.logits(found).double()
    own = logits.gather(1, labels[:, None])[:, 0]
    margin = own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    for kind in [kind for kind, known in CASES if known == norm]:
        bound = kind(clf, threat_norm=norm).margins(x, y, eps)
        assert bool((margin.view(2, 1000).amin(1) >= bound - 1e-5).all())


@pytest.mark.parametrize("name", NETWORKS)
def test_crown_is_never_looser_than_ibp_and_tighter_on_average(name: str) -> None:
    clf, x = networks()[name]
    y = clf.logits(x).argmax(1)
    for eps in (0.0, 0.01, 0.05, 0.2):
        ibp, crown = (kind(clf).margins(x, y, eps) for kind in (IBP, CROWN))
        assert bool((crown >= ibp - 1e-9).all())
        if eps == 0.05:
            assert float(crown.mean()) > float(ibp.mean()) + 1e-3
    at_rest = clf.logits(x).double()
    margin = (at_rest.gather(1, y[:, None]) - at_rest).scatter(1, y[:, None], torch.inf).amin(1)
    for kind in (IBP, CROWN):
        assert torch.allclose(kind(clf).margins(x, y, 0.0), margin, atol=1e-4)


@EVERY
@pytest.mark.parametrize("name", NETWORKS)
def test_certified_is_at_most_empirical_on_every_sample(name: str, kind: type[Bounds], norm: str) -> None:
    clf, x = networks()[name]
    y = clf.logits(x).argmax(1)
    _, radii = kind(clf, threat_norm=norm).certify(x, radii=[4 * RADII[norm]])
    assert bool((radii > 0).any())
    kept = radii > 0
    attack = PGD(threat=make_threat(norm, radii[kept].float()), steps=40)
    assert not bool(attack.run(clf, x[kept], y[kept]).success.any())


class Odd(nn.Module):
    """A tanh between linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        self.squash = nn.Tanh()
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.last(self.squash(self.inner(x)))
        return logits


class Branching(Odd):
    """Python that asks for a value."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return super().forward(x if float(x.sum()) > 0 else -x)


@pytest.mark.parametrize("kind", [IBP, CROWN])
def test_a_layer_without_bounds_is_named_in_one_line(kind: type[Bounds]) -> None:
    x = torch.rand(2, 3, 2, 2)
    with pytest.raises(
        ModelError, match=rf"{kind.name}: layer squash \(Tanh\) has no bounds; known are"
    ) as caught:
        kind(Classifier(Odd().eval())).certify(x)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=rf"{kind.name}: Branching cannot be traced") as caught:
        kind(Classifier(Branching().eval())).certify(x)
    assert "\n" not in str(caught.value)
    with pytest.raises(RobustError, match="l0 form"):
        kind(Classifier(Odd().eval()), threat_norm="l0")


@pytest.mark.parametrize("norm", list(DUAL))
def test_clever_is_exact_on_a_linear_model_and_capped_by_its_ball(norm: str) -> None:
    clf, x, slope, offset = hyperplane(classes=4)
    _, exact = distances(x, slope, offset, DUAL[norm])
    ball = float(exact.median())
    _, scores = CLEVER(clf, threat_norm=norm, batches=4, samples=8).certify(x, radii=[ball])
    assert torch.allclose(scores, exact.clamp_max(ball), rtol=1e-4)


def test_clever_is_near_what_attacks_find_and_says_that_it_is_an_estimate() -> None:
    clf, x = networks()["dense"]
    certificate = CLEVER(clf, threat_norm="l2", batches=20, samples=32)
    _, scores = certificate.certify(x, radii=[0.5])
    _, proved = CROWN(clf, threat_norm="l2").certify(x, radii=[0.5])
    assert bool((scores >= proved * 0.6).all() & (scores <= proved * 3).all())
    assert "estimate" in certificate.conditions({})["guarantee"]
    again = CLEVER(clf, threat_norm="l2", batches=20, samples=32)
    part = again.certify(x[3:], radii=[0.5], index=torch.arange(3, len(x)))[1]
    assert torch.allclose(part, scores[3:], rtol=1e-4)
