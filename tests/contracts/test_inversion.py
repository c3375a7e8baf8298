"""What holds for every inversion in the registry; a new row is tested here without a new file."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from robust.attacks.privacy import REGISTRY, get
from robust.config import from_mapping
from robust.errors import ConfigError, RobustError
from robust.inversion import Protocol, Recovery
from robust.registry import card
from tests.attacks.privacy.inversion_parts import SHAPE, make, perceptron, seen

NAMES = [name for name in REGISTRY if getattr(get(name), "kind", None) == "inversion"]
EVERY = pytest.mark.parametrize("name", NAMES)
GRADIENT = pytest.mark.parametrize("name", [name for name in NAMES if get(name).sees == "gradient"])
SHORT: dict[str, dict[str, Any]] = {
    "dlg": {"steps": 20},
    "idlg": {"steps": 20},
    "inverting-gradients": {"steps": 10},
    "model-inversion": {"steps": 10},
}
BOX: dict[str, Any] = {"mean": 0.2, "std": 0.5, "bounds": (-1.0, 1.0)}


def ran(name: str, batch: int = 1, seed: int = 0, **changes: Any) -> tuple[Recovery, Any]:
    """The attack on a perceptron whose inputs live in another box, and that model."""
    clf, protocol = make(perceptron, **BOX), Protocol(batch=batch)
    attack = get(name)(**{**SHORT.get(name, {}), **changes})
    if attack.sees == "confidences":
        return attack(clf, torch.arange(batch), shape=SHAPE, seed=seed), clf
    observe = seen(clf, slice(0, batch), protocol)[0]
    return attack(clf, observe, shape=SHAPE, protocol=protocol, seed=seed, index=3), clf


@EVERY
@pytest.mark.parametrize("batch", [1, 3])
def test_it_gives_images_in_the_box_labels_and_a_track_that_never_rises(name: str, batch: int) -> None:
    found, clf = ran(name, batch)
    assert found.x.shape == (batch, *SHAPE)
    assert found.x.dtype == torch.float32
    assert bool(((found.x >= clf.bounds[0]) & (found.x <= clf.bounds[1])).all())
    assert found.y.shape == (batch,)
    assert bool((found.y < 10).all())
    steps = found.track.nan_to_num(0).diff(dim=1)
    assert bool((steps <= 1e-9).all())


@EVERY
def test_the_same_seed_gives_the_same_images(name: str) -> None:
    assert torch.equal(ran(name)[0].x, ran(name)[0].x)


@EVERY
def test_the_model_is_left_as_it_was(name: str) -> None:
    clf = make(perceptron, **BOX)
    _, used = ran(name)
    assert used.digest() == clf.digest()
    assert all(parameter.requires_grad and parameter.grad is None for parameter in used.module.parameters())
    assert not used.module.training


@EVERY
def test_it_is_made_of_its_own_configuration_and_has_a_card(name: str) -> None:
    attack = get(name)(**SHORT.get(name, {}))
    assert from_mapping(attack.config(), get(name)) == attack
    assert attack.name == name
    assert "19" in card(get(name)) or "20" in card(get(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        attack.extra = 1


@EVERY
def test_impossible_settings_are_one_line(name: str) -> None:
    field = "steps" if "steps" in get(name).__dataclass_fields__ else "alike"
    with pytest.raises(ConfigError, match=f"{name}: {field}=0"):
        get(name)(**{field: 0})
    if "start" in get(name).__dataclass_fields__:
        with pytest.raises(ConfigError, match="is none of noise, grey, prior"):
            get(name)(start="nois")


@GRADIENT
def test_gradients_that_tell_nothing_are_one_line(name: str) -> None:
    clf = make(perceptron)
    observe = seen(clf, slice(0, 1))[0]
    attack, parts = get(name)(**SHORT.get(name, {})), observe()

    def asked(change: Any, **options: Any) -> str:
        with pytest.raises(RobustError) as caught:
            attack(clf, lambda: change(parts), **{"shape": SHAPE, **options})
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"{name}: the observed gradient has 3 tensors for 4 parameters" in asked(lambda found: found[:-1])
    assert "for the parameter 1.weight (128, 64)" in asked(lambda found: [found[0].T, *found[1:]])
    assert "is zero everywhere" in asked(lambda found: [0 * part for part in found])
    assert "holds NaN or an infinity" in asked(lambda found: [part / 0 for part in found])
    assert "takes no samples of shape (1, 9, 9)" in asked(lambda found: found, shape=(1, 9, 9))
    assert "give one for each sample" in asked(lambda found: found, labels=torch.tensor([1, 2]))


@GRADIENT
def test_labels_that_are_known_are_kept(name: str) -> None:
    clf = make(perceptron)
    observe = seen(clf, slice(0, 1))[0]
    found = get(name)(**SHORT.get(name, {}))(clf, observe, shape=SHAPE, labels=torch.tensor([7]))
    assert found.y.tolist() == [7]
