"""What holds for every certificate in the registry; a new row is tested here without a new file."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch
from torch import nn

from robust.attacks import PGD
from robust.certificate import Certificate
from robust.cli.certify import METHODS
from robust.cli.main import run
from robust.defenses import REGISTRY, get
from robust.errors import RobustError
from robust.registry import card
from robust.threat import make_threat
from tests.defenses.certified_parts import distances, hyperplane, networks

NAMES = [name for name in REGISTRY if get(name).kind in ("certificate", "estimate")]
EVERY = pytest.mark.parametrize("name", NAMES)
# What makes one short.
SHORT: dict[str, dict[str, Any]] = {"clever": {"batches": 5, "samples": 8}}
SETTINGS: dict[str, dict[str, Any]] = {"smoothing": {"n0": 20, "n": 300}}
DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}


def make(name: str, clf: Any) -> Certificate:
    """A certificate at a test's size."""
    certificate: Certificate = get(name)(clf, **SHORT.get(name, {}))
    return certificate


def test_the_command_knows_every_row() -> None:
    assert set(NAMES) == set(METHODS)


@EVERY
def test_a_card_names_the_paper_and_the_listing_says_what_it_promises(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = get(name)
    assert issubclass(kind, Certificate)
    assert "arXiv:" in card(kind)
    assert kind.name == name
    assert run(["list", "defenses", "--json"]) == 0
    [row] = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["name"] == name]
    assert row["kind"] == kind.kind
    assert row["norms"] == list(kind.norms)
    assert row["guarantee"] == kind.guarantee != ""
    assert ("estimate" in row["card"]) == (row["kind"] == "estimate")
    assert row["paper"]


@EVERY
def test_classes_and_radii_have_their_shapes_and_a_record_each(name: str) -> None:
    clf, x = networks()["residual"]
    certificate, settings = make(name, clf), SETTINGS.get(name, {})
    classes, radii = certificate.certify(x, radii=[0.05], **settings)
    assert (classes.shape, classes.dtype) == ((len(x),), torch.int64)
    assert (radii.shape, radii.dtype) == ((len(x),), torch.float64)
    assert bool((radii >= 0).all() & radii.isfinite().all())
    assert bool((radii[classes < 0] == 0).all())
    records = certificate.records(x, radii=[0.05], **settings)
    assert [row["class"] for row in records] == classes.tolist()
    assert [row["radius"] for row in records] == radii.tolist()
    assert all("float32" in row["voter"] for row in records)
    assert json.loads(json.dumps(records)) == records
    assert certificate.records(x[:0]) == []
    assert certificate.norm in certificate.norms


@EVERY
def test_it_never_promises_more_than_a_linear_classifier_keeps(name: str) -> None:
    clf, x, slope, offset = hyperplane()
    certificate = make(name, clf)
    y, exact = distances(x, slope, offset, DUAL[certificate.norm])
    classes, radii = certificate.certify(x, radii=[0.5], **SETTINGS.get(name, {}))
    assert bool((classes == y)[classes >= 0].all())
    # The box may cut the ball, and then the model keeps its class further than the hyperplane is.
    cut = (x.flatten(1) - 0.5).abs().amax(1) > 0.5 - exact
    assert bool((radii <= exact * (1 + 1e-6))[~cut].all())


@EVERY
def test_pgd_breaks_no_sample_within_its_radius(name: str) -> None:
    clf, x, *_ = hyperplane()
    certificate = make(name, clf)
    if certificate.kind == "estimate":
        pytest.skip("an estimate promises nothing")
    classes, radii = certificate.certify(x, radii=[0.5], **SETTINGS.get(name, {}))
    kept = radii > 0
    attack = PGD(threat=make_threat(certificate.norm, radii[kept].float() * 0.999), steps=30)
    assert not bool(attack.run(clf, x[kept], classes[kept]).success.any())


@EVERY
def test_the_model_is_left_as_it_was(name: str) -> None:
    clf, x = networks()["residual"]
    before = {key: value.clone() for key, value in clf.module.state_dict().items()}
    make(name, clf).certify(x[:2], **SETTINGS.get(name, {}))
    assert all(parameter.requires_grad and parameter.grad is None for parameter in clf.module.parameters())
    assert all(torch.equal(before[key], value) for key, value in clf.module.state_dict().items())


@EVERY
def test_its_conditions_are_told_and_what_it_cannot_take_is_one_line(name: str) -> None:
    clf, x = networks()["dense"]
    told = make(name, clf).conditions({"radii": [0.1]})
    assert json.loads(json.dumps(told)) == told
    assert (told["method"], told["kind"], told["settings"]) == (name, get(name).kind, {"radii": [0.1]})
    assert set(told["parameters"]) == set(inspect.signature(get(name)).parameters) - {"clf"}
    for call in (
        lambda: get(name)(nn.Identity()),
        lambda: make(name, clf).certify(x, radii=[float("inf")]),
        lambda: make(name, clf).certify(x + 2),
    ):
        with pytest.raises(RobustError) as caught:
            call()
        assert "\n" not in str(caught.value)


@EVERY
def test_as_a_wrapper_it_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", "--defense", name]) == 2
    line = capsys.readouterr().err
    assert f"{name} wraps no model" in line
    assert line.count("\n") == 1
