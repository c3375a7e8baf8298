"""What holds for every transform in the registry; a new row is tested here without a new file."""

from __future__ import annotations

import json
import pickle
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust import Classifier, Linf
from robust.attacks import PGD
from robust.defense import Defended, Defense, compose
from robust.defenses import REGISTRY, get
from robust.errors import RobustError
from robust.registry import card
from robust.rng import seeded
from robust.twin import make_twin

NAMES = [name for name in REGISTRY if get(name).kind == "transform"]
EVERY = pytest.mark.parametrize("name", NAMES)
RANDOMISED = [name for name in NAMES if get(name).randomised]
FIXED = [name for name in NAMES if not get(name).randomised]
UNIT = (0.0, 1.0)


class Net(nn.Module):
    """A smooth network with running statistics, for images of any size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Linear(8 * 9, 6)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        hidden = torch.tanh(self.norm(self.first(x)))
        logits: Tensor = 9 * self.last(nn.functional.adaptive_avg_pool2d(hidden, 3).flatten(1))
        return logits


def subject(channels: int = 3, bounds: tuple[float, float] = UNIT, n: int = 8) -> tuple[Classifier, Tensor]:
    """A classifier and smooth images in its box."""
    generator = torch.Generator().manual_seed(channels)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = Net(channels).eval()
    coarse = torch.rand(n, channels, 6, 6, generator=generator)
    x = nn.functional.interpolate(coarse, (16, 16), mode="bilinear")
    width = bounds[1] - bounds[0]
    return Classifier(module, bounds, mean=bounds[0] + width / 2, std=width / 4), x * width + bounds[0]


def answers(clf: Classifier, x: Tensor, key: int = 0) -> Tensor:
    """Logits, with what the classifier draws keyed."""
    with seeded(key, clf.device):
        return clf.logits(x)


@EVERY
def test_a_card_names_the_paper_and_the_class_its_own_row(name: str) -> None:
    kind = get(name)
    assert "arXiv:" in card(kind)
    assert kind.name == name
    assert kind.differentiable != kind.bpda, (
        "where autograd is wrong, a substitute is declared, and nowhere else"
    )
    assert kind.attacked_by()


@EVERY
@pytest.mark.parametrize(("channels", "bounds"), [(1, UNIT), (3, (-1.0, 3.0)), (4, (0.0, 255.0))])
def test_it_wraps_a_classifier_of_any_channels_and_box(
    name: str, channels: int, bounds: tuple[float, float]
) -> None:
    clf, x = subject(channels, bounds)
    defended = get(name)()(clf)
    assert isinstance(defended, Defended)
    assert defended.undefended is clf
    assert defended.bounds == bounds
    assert name in defended.name
    logits = answers(defended, x)
    assert logits.shape == (len(x), 6)
    assert bool(logits.isfinite().all())
    assert not torch.equal(logits, clf.logits(x)), "a defence that changes nothing"
    assert defended.logits(x[:0]).shape == (0, 6)


@EVERY
def test_the_box_is_only_a_unit(name: str) -> None:
    _, x = subject(n=2)
    defense = get(name)()
    plain, moved = defense.transform(x, UNIT, 5), defense.transform(x * 4 - 1, (-1.0, 3.0), 5)
    assert torch.allclose(moved, plain * 4 - 1, atol=1e-5)


@EVERY
def test_the_module_is_left_as_it_was(name: str) -> None:
    clf, x = subject()
    clf.module.train()
    before = {key: value.clone() for key, value in clf.module.state_dict().items()}
    x.requires_grad_(True)
    get(name)()(clf)(x).sum().backward()
    assert clf.module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in clf.module.parameters())
    assert all(torch.equal(before[key], value) for key, value in clf.module.state_dict().items())


@EVERY
def test_the_gradient_exists_and_is_finite(name: str) -> None:
    clf, x = subject()
    x.requires_grad_(True)
    logits = get(name)()(clf)(x)
    (gradient,) = torch.autograd.grad(logits[:, 0].sum(), x)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())


@pytest.mark.parametrize("name", [name for name in NAMES if get(name).differentiable])
def test_a_declared_gradient_is_the_slope(name: str) -> None:
    _, x = subject(n=2)
    x = x.double() + 1e-3 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).double()
    defense, step = get(name)(), 1e-6
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()
    weight = torch.randn(
        defense.transform(x, UNIT, 3).shape, generator=torch.Generator().manual_seed(3)
    ).double()

    def value(point: Tensor) -> Tensor:
        return (defense.apply(point, UNIT, 3) * weight).sum()

    (gradient,) = torch.autograd.grad(value(x.requires_grad_(True)), x)
    with torch.no_grad():
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(float(slope), rel=1e-4)


@EVERY
def test_an_attack_on_the_declared_gradient_beats_random_noise(name: str) -> None:
    clf, x = subject(n=24)
    defended = get(name)()(clf)
    y = answers(defended, x).argmax(1)
    threat = Linf(0.1)
    noisy = (
        x + 0.1 * torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(4)).mul(2).sub(1)
    ).clamp(0, 1)
    copies = 5 if defended.randomised else 1
    found = PGD(threat=threat, steps=8, copies=copies).run(defended, x, y)
    by_chance = (answers(defended, noisy).argmax(1) != y).float().mean()
    assert float(found.success.float().mean()) >= float(by_chance) + 0.3
    assert bool(threat.inside(found.x_adv, x, UNIT).all())


@pytest.mark.parametrize("name", [name for name in NAMES if get(name).bpda])
def test_the_value_is_the_transform_s_whether_or_not_a_gradient_is_taken(name: str) -> None:
    _, x = subject()
    defense = get(name)()
    assert torch.equal(defense.apply(x.clone().requires_grad_(True), UNIT, 7), defense.transform(x, UNIT, 7))
    aware = defense.apply(x.clone().requires_grad_(True), UNIT, 7)
    unaware = defense.apply(x.clone().requires_grad_(True), UNIT, 7, aware=False)
    assert torch.equal(aware, unaware)


@pytest.mark.parametrize("name", RANDOMISED)
def test_what_it_draws_is_keyed(name: str) -> None:
    clf, x = subject()
    defended = get(name)()(clf)
    assert defended.randomised
    assert torch.equal(answers(defended, x, 1), answers(defended, x, 1))
    assert not torch.equal(answers(defended, x, 1), answers(defended, x, 2))
    twice = get(name)().transform(x[:1].expand(6, -1, -1, -1).contiguous(), UNIT, 3)
    assert len({bytes(row.numpy().tobytes()) for row in twice}) > 1, "rows of a batch draw for themselves"


@pytest.mark.parametrize("name", FIXED)
def test_what_is_not_randomised_draws_nothing_and_has_a_twin(name: str) -> None:
    clf, x = subject()
    defended = get(name)()(clf)
    state = torch.get_rng_state()
    first = defended.logits(x)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, answers(defended, x, 9))
    defended.check(x)
    assert not defended.randomised
    twin = make_twin(defended, x)
    assert twin is not None
    assert torch.allclose(twin.logits(x), first, atol=1e-3)


@EVERY
def test_it_composes_in_the_order_in_which_an_input_meets_it(name: str) -> None:
    clf, x = subject()
    defense, last = get(name)(), get("bit-depth")(bits=2)
    chain = compose(clf, [defense, last])
    assert isinstance(chain, Defended)
    assert chain.defenses == [defense, last]
    assert chain.undefended is clf
    assert (chain.bpda, chain.randomised, chain.differentiable) == (True, defense.randomised, False)
    with seeded(0, clf.device):
        key = int(torch.randint(1 << 62, ()))
    by_hand = last.transform(defense.transform(x, UNIT, key), UNIT, 0)
    assert torch.equal(answers(chain, x), clf.logits(by_hand))
    assert compose(clf, []) is clf


def wrong(name: str) -> list[tuple[str, Any]]:
    """Every field of a defence with values that no parameter takes."""
    defaults = get(name)()
    kinds = {item.name: type(getattr(defaults, item.name)) for item in fields(defaults)}
    return [(field, kind(-1)) for field, kind in kinds.items()] + [
        (field, value)
        for field, kind in kinds.items()
        if kind is float
        for value in (float("nan"), float("inf"))
    ]


@EVERY
def test_an_impossible_parameter_is_one_line(name: str) -> None:
    cases = wrong(name)
    assert cases
    for field, value in cases:
        with pytest.raises(RobustError) as caught:
            get(name)(**{field: value})
        line = str(caught.value)
        assert "\n" not in line
        assert line.startswith(name)
        assert f"{field}=" in line
    with pytest.raises(RobustError, match="wraps a Classifier"):
        get(name)()(nn.Identity())


@EVERY
def test_it_is_a_frozen_value_that_pickles_and_names_its_parameters(name: str) -> None:
    clf, x = subject()
    defense: Defense = get(name)()
    again = pickle.loads(pickle.dumps(defense))
    assert again == defense
    assert hash(again) == hash(defense)
    assert torch.equal(again.transform(x, UNIT, 3), defense.transform(x, UNIT, 3))
    told = json.loads(json.dumps(defense.describe()))
    assert get(told["name"])(**told["parameters"]) == defense
    assert type(defense).__name__ in repr(defense)
    assert type(defense).__name__ in repr(defense(clf))
    field = fields(defense)[0].name
    value = getattr(defense, field)
    other = replace(defense, **{field: value + 1 if isinstance(value, int) else value * 0.99})
    assert len({clf.digest(), defense(clf).digest(), other(clf).digest()}) == 3
    assert again(clf).digest() == defense(clf).digest()
