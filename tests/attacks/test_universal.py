"""Universal perturbations: closed forms on linear models, keyed order, storage, and a real network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust.attacks.trial import Trial
from robust.attacks.universal.base import batches
from robust.attacks.universal.perturbation import Perturbation
from robust.attacks.universal.targeted_uap import TargetedUAP
from robust.attacks.universal.uap import UAP
from robust.classifier import Classifier
from robust.data import load_data
from robust.errors import DataError, RobustError
from robust.models import load_model
from robust.threat import L2, Linf, Threat
from robust.universal import outcome
from tests.contracts.subjects import linear, small


@pytest.mark.parametrize("threat", [Linf(0.1), L2(1.5)], ids=["linf", "l2"])
def test_towards_a_class_of_a_two_class_linear_model_it_is_the_steepest_direction(threat: Threat) -> None:
    clf, x, _, weight, _ = linear(classes=2)
    found = TargetedUAP(threat=threat, steps=60).fit(clf, x, torch.zeros(len(x), dtype=torch.long), targets=1)
    direction = (weight[1] - weight[0]).view(1, *x.shape[1:])
    best = float(threat.eps) * threat.steepest(direction)
    assert torch.allclose(found.delta, best[0], atol=2e-3 * float(best.abs().max()))
    assert found.target == 1
    assert bool(threat.inside(found.apply(x), x, clf.bounds).all())


@pytest.mark.parametrize(
    "fields", [{"batch": 1, "steps": 40}, {"batch": 8, "steps": 40}], ids=["paper", "batches"]
)
def test_the_paper_s_algorithm_fools_a_linear_model_that_noise_does_not(fields: dict[str, int]) -> None:
    clf, x, y, _, _ = linear(n=40)
    threat = L2(2.0)
    found = UAP(threat=threat, method="deepfool", **fields).fit(clf, x, y)
    assert float(found.delta.norm()) <= 2.0 + 1e-5
    fooled, noise = (
        float((clf.logits(change.apply(x)).argmax(1) != y).double().mean())
        for change in (found, found.control())
    )
    assert fooled > 0.5
    assert fooled > 2 * noise


def test_the_gradient_is_at_least_as_strong_as_the_paper_s_algorithm() -> None:
    clf, x, y = small(n=80)
    rates = {}
    for method in ("gradient", "deepfool"):
        found = UAP(threat=Linf(0.08), method=method, steps=60, batch=20).fit(clf, x, y)  # type: ignore[arg-type]
        rates[method] = float((clf.logits(found.apply(x)).argmax(1) != y).double().mean())
    assert rates["gradient"] >= rates["deepfool"] - 0.02
    assert rates["gradient"] > 0.4


def test_what_is_learnt_depends_on_the_samples_identities_and_not_on_their_places() -> None:
    clf, x, y = small(n=30)
    attack, order = UAP(threat=Linf(0.06), steps=30, batch=7), torch.randperm(30)
    one = attack.fit(clf, x, y, seed=3)
    two = attack.fit(clf, x[order], y[order], seed=3, index=order)
    assert torch.equal(one.delta, two.delta)
    assert not torch.equal(one.delta, attack.fit(clf, x, y, seed=4).delta)


def test_every_epoch_takes_each_sample_once() -> None:
    clf, x, y = small(n=10)
    trial = Trial(UAP(threat=Linf(0.1)), clf, x, y, seed=1)
    rows = torch.cat([rows for _, rows in batches(trial, 4, 5)])
    assert len(rows) == 20
    assert rows[:10].sort().values.tolist() == rows[10:].sort().values.tolist() == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


def test_without_a_target_it_leads_to_the_class_that_is_nearest_to_most() -> None:
    clf, x, y = small(n=60)
    found = TargetedUAP(threat=Linf(0.1), steps=60).fit(clf, x, y)
    rivals = clf.logits(x).scatter(1, y[:, None], -torch.inf).argmax(1)
    assert found.target == int(torch.bincount(rivals).argmax())
    reached = clf.logits(found.apply(x)).argmax(1) == found.target
    assert float(reached.double().mean()) > 0.6


def test_it_counts_what_it_costs_and_keeps_a_history() -> None:
    clf, x, y = small(n=20)
    clf.check(x)
    before = clf.cost.backwards
    found = UAP(threat=Linf(0.06), steps=120, batch=10).fit(clf, x, y, precision="original")
    assert found.cost["backwards"] == clf.cost.backwards - before == 120 * 10
    assert 40 <= len(found.history) <= 60
    assert found.history[-1]["step"] == 120
    assert found.history[-1]["loss"] > found.history[0]["loss"]


def test_a_perturbation_is_stored_whole_and_fits_its_own_images_only(tmp_path: Path) -> None:
    clf, x, y = small(n=10)
    one = UAP(threat=Linf(0.06), steps=5).fit(clf, x, y)
    one.save(tmp_path / "p.safetensors")
    two = Perturbation.load(tmp_path / "p.safetensors")
    assert torch.equal(one.apply(x), two.apply(x))
    assert (two.threat, two.bounds, two.history) == (one.threat, one.bounds, one.history)
    with pytest.raises(DataError, match="fits images"):
        one.apply(torch.rand(2, 1, 5, 5))
    with pytest.raises(RobustError, match="holds no perturbation"):
        Perturbation.load(tmp_path / "absent")


@pytest.mark.parametrize(
    "fields", [{"steps": 0}, {"batch": 0}, {"momentum": 1.0}, {"step_size": 0.0}, {"method": "x"}]
)
def test_what_cannot_be_is_one_line(fields: dict[str, object]) -> None:
    clf, x, y = small(n=3)
    with pytest.raises(RobustError) as caught:
        UAP(threat=Linf(0.1), **fields).run(clf, x, y)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_on_a_real_network_it_fools_unseen_images_that_noise_does_not(
    shared: Path, cifar10_test: Path
) -> None:
    weights = shared / "weights" / "cifar10_resnet20.safetensors"
    if not weights.is_file():
        pytest.skip(f"no ResNet-20: {weights} is missing")
    clf: Classifier = load_model(
        "zoo:resnet20", weights=weights, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)
    )
    data = load_data(f"imagefolder:{cifar10_test}", n=400)
    x, y = data.subset(range(200)).tensors()
    found = UAP(threat=Linf(8 / 255), steps=80).fit(clf, x, y)
    unseen = data.subset(range(200, 400))

    def rate(change: Perturbation) -> float:
        def apply(images: Tensor, _: Tensor) -> Tensor:
            return change.apply(images)

        return outcome(clf, unseen, apply).rate or 0.0

    assert rate(found) > 0.5
    assert rate(found) > 2 * rate(found.control())
