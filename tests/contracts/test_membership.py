"""What holds for every membership attack in the registry; a new row is tested here without a new file."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from robust import Oracle
from robust.attacks.privacy import REGISTRY, get
from robust.attacks.privacy.base import MembershipAttack
from robust.config import from_mapping
from robust.errors import RobustError
from robust.membership import References
from robust.roc import roc
from tests.attacks.privacy.membership_parts import N, subject

NAMES = [name for name in REGISTRY if getattr(get(name), "kind", None) == "membership"]
EVERY = pytest.mark.parametrize("name", NAMES)
SHORT: dict[str, dict[str, Any]] = {
    "label-only-boundary": {"queries": 40},
    "shadow": {"samples": 1500, "epochs": 10},
    "learned": {"samples": 1500},
}
_KEPT: dict[tuple[str, bool], torch.Tensor] = {}


def make(name: str) -> MembershipAttack:
    attack: MembershipAttack = get(name)(**SHORT.get(name, {}))
    return attack


def scores(name: str, seen: bool = True) -> torch.Tensor:
    """Of the target that learnt half of the samples by heart, or of a model that saw none; made once."""
    if (name, seen) not in _KEPT:
        target, x, y, _, references = subject(seen)
        _KEPT[name, seen] = make(name)(target, x, y, references=references, seed=3)
    return _KEPT[name, seen]


def interval(name: str, seen: bool) -> tuple[float, float]:
    """The AUC's."""
    members = subject()[3]
    found = scores(name, seen)
    return roc(found[~members].numpy(), found[members].numpy()).interval


@EVERY
def test_it_gives_a_number_for_every_sample(name: str) -> None:
    found = scores(name)
    assert found.shape == (N,)
    assert found.dtype == torch.float64
    assert bool(found.isfinite().all())


@EVERY
def test_it_tells_members_of_a_model_that_learnt_by_heart(name: str) -> None:
    assert interval(name, True)[0] > 0.5


@EVERY
def test_it_is_at_chance_on_a_model_that_saw_no_sample(name: str) -> None:
    low, high = interval(name, False)
    assert low < 0.5 < high


@EVERY
def test_the_order_of_samples_does_not_matter(name: str) -> None:
    target, x, y, _, references = subject()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = References(references.models, references.inside[:, order])
    found = make(name)(target, x[order], y[order], references=shuffled, seed=3, index=order)
    if name in ("shadow", "learned"):  # they train on rows whose order is another
        assert torch.corrcoef(torch.stack([found, scores(name)[order]]))[0, 1] > 0.8
    else:
        assert torch.allclose(found, scores(name)[order], rtol=1e-4, atol=1e-4)


@EVERY
def test_the_target_is_left_as_it_was(name: str) -> None:
    target, x, y, _, references = subject()
    before = target.digest()
    make(name)(target, x[:60], y[:60], references=References(references.models, references.inside[:, :60]))
    assert target.digest() == before


@EVERY
def test_it_is_made_of_its_own_configuration(name: str) -> None:
    attack = make(name)
    assert from_mapping(attack.config(), get(name)) == attack
    assert attack.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.extra = 1  # type: ignore[attr-defined]


@EVERY
def test_what_it_needs_is_asked_for_in_one_line(name: str) -> None:
    target, x, y, _, _ = subject()
    attack = make(name)
    if attack.needs():
        with pytest.raises(RobustError, match=r"needs \d reference models, and there are 0; give more"):
            attack(target, x, y)
    if attack.sees == "scores":
        with pytest.raises(RobustError, match="gives labels; use a label-only attack"):
            attack(Oracle(target, answers="labels"), x, y)
    for labels in (y[:-1], y.float()):
        with pytest.raises(RobustError, match="give integers"):
            attack(target, x, labels)
