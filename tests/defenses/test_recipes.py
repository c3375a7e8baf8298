"""The methods' losses and weight gradients against the papers' formulas, written out in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.defenses.training import get
from robust.defenses.training.adversarial import AdversarialRecipe
from robust.defenses.training.awp import AWP
from robust.defenses.training.fast import Fast
from robust.defenses.training.gaussian import Gaussian
from robust.defenses.training.label_smoothing import LabelSmoothing
from robust.defenses.training.mart import MART, boosted_cross_entropy
from robust.defenses.training.mixup import Mixup
from robust.defenses.training.pgd_at import PGDAT
from robust.defenses.training.trades import TRADES
from robust.defenses.training.weights import attached, unlearned
from robust.errors import ConfigError, RobustError
from robust.learner import Learner
from tests.defenses.recipe_parts import EXACT, Exact, batch, descent, network, softmax


def ours(recipe: AdversarialRecipe, points: Tensor) -> tuple[float, list[Tensor]]:
    """The outer loss and its weight gradients as a step sees them, in float64."""
    x, y, _ = batch()
    clf = Exact(network().double())
    value = recipe.outer(clf, x.double(), points.double(), y)
    value.backward()
    return float(value.detach()), [p.grad for p in clf.module.parameters() if p.grad is not None]


def attacked(recipe: AdversarialRecipe) -> Tensor:
    return recipe.adversarial(Learner(network()), *batch(), 7)


def paper_trades(module: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, beta: float) -> Tensor:
    clean, moved = softmax(module(x)), softmax(module(x_adv))
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):
        total = total - clean[i, y[i]].log()
        for k in range(3):
            total = total + beta * clean[i, k] * (clean[i, k] / moved[i, k]).log()
    return total / len(x)


def paper_mart(module: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, lam: float) -> Tensor:
    clean, moved = softmax(module(x)), softmax(module(x_adv))
    total = torch.zeros((), dtype=x.dtype)
    for i in range(len(x)):
        label = int(y[i])
        wrong = moved[i, [k for k in range(3) if k != label]].max()
        total = total - moved[i, label].log() - (1 - wrong).log()
        divergence = sum((clean[i, k] * (clean[i, k] / moved[i, k]).log() for k in range(3)), torch.zeros(()))
        total = total + lam * divergence * (1 - clean[i, label])
    return total / len(x)


def paper_madry(module: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, _: float) -> Tensor:
    return -softmax(module(x_adv))[torch.arange(len(x)), y].log().mean()


Outer = Callable[[nn.Module, Tensor, Tensor, Tensor, float], Tensor]


def paper_awp(outer: Outer, x: Tensor, x_adv: Tensor, y: Tensor, beta: float, gamma: float) -> Any:
    """Loss and gradient at weights moved by gamma ‖w‖ g / ‖g‖, tensor by tensor, on a copy of the network."""
    module = network().double()
    uphill = descent(module, outer(module, x, x_adv, y, beta))
    moved = network().double()
    with torch.no_grad():
        for weight, g in zip(moved.parameters(), uphill, strict=True):
            if weight.dim() > 1:
                weight += gamma * math.sqrt(float((weight**2).sum())) * g / math.sqrt(float((g**2).sum()))
    value = outer(moved, x, x_adv, y, beta)
    return float(value.detach()), descent(moved, value)


@pytest.mark.parametrize(
    ("recipe", "outer", "weight"),
    [
        (TRADES(eps=0.1, steps=3, beta=6.0), paper_trades, 6.0),
        (TRADES(eps=0.4, steps=2, beta=0.5), paper_trades, 0.5),
        (MART(eps=0.1, steps=3, lam=5.0), paper_mart, 5.0),
        (MART(eps=0.4, steps=2, lam=0.5), paper_mart, 0.5),
        (PGDAT(eps=0.1, steps=3), paper_madry, 0.0),
    ],
    ids=["trades-6", "trades-0.5", "mart-5", "mart-0.5", "pgd-at"],
)
def test_loss_and_gradients_are_the_papers(recipe: AdversarialRecipe, outer: Outer, weight: float) -> None:
    x, y, index = batch()
    points = attacked(recipe)
    module = network().double()
    value = outer(module, x.double(), points.double(), y, weight)
    expected = descent(module, value)
    found, gradients = ours(recipe, points)
    assert found == pytest.approx(float(value.detach()), rel=1e-12)
    torch.testing.assert_close(gradients, expected, **EXACT)
    clf = Learner(network())  # and the whole step, in float32
    loss = recipe.loss(clf, x, y, index, 7)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(found, rel=1e-5)
    for parameter, wanted in zip(clf.module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.005, 0.3])
@pytest.mark.parametrize(("base", "outer"), [("pgd-at", paper_madry), ("trades", paper_trades)])
def test_awp_descends_with_the_gradient_at_the_moved_weights(base: Any, outer: Outer, gamma: float) -> None:
    recipe = AWP(eps=0.1, steps=3, base=base, gamma=gamma, beta=2.0)
    x, y, index = batch()
    points = attacked(recipe)
    value, expected = paper_awp(outer, x.double(), points.double(), y, 2.0, gamma)
    found, gradients = ours(recipe, points)
    assert found == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradients, expected, **EXACT)
    at_rest = float(outer(network().double(), x.double(), points.double(), y, 2.0).detach())
    assert value > at_rest + gamma / 10, "the moved weights are worse"
    clf = Learner(network())
    loss = recipe.loss(clf, x, y, index, 7)
    (loss / 4).backward()  # as a loop with accumulated gradients does
    assert float(loss.detach()) == pytest.approx(found, rel=1e-5)
    for parameter, wanted in zip(clf.module.parameters(), expected, strict=True):
        torch.testing.assert_close(4 * parameter.grad.double(), wanted, rtol=1e-3, atol=1e-4)


def test_awp_s_base_has_the_same_inner_points() -> None:
    for base, method in (("pgd-at", PGDAT), ("trades", TRADES)):
        recipe = AWP(eps=0.1, steps=3, step_size=0.05, base=base)  # type: ignore[arg-type]
        assert torch.equal(attacked(recipe), attacked(method(eps=0.1, steps=3, step_size=0.05)))


def test_mart_s_loss_stays_finite_where_a_wrong_class_is_certain() -> None:
    logits = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    value = boosted_cross_entropy(logits, torch.tensor([0])).sum()
    value.backward()
    assert float(value.detach()) == pytest.approx(400 - math.log(2))
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_label_smoothing_is_the_papers_mixture_of_labels() -> None:
    x, y, index = batch()
    clf = Learner(network())
    logs = network().double()(x.double()).log_softmax(1).detach()
    soft = 0.8 * F.one_hot(y, 3) + 0.2 / 3
    loss = LabelSmoothing(smoothing=0.2).loss(clf, x, y, index, 0)
    assert float(loss.detach()) == pytest.approx(float(-(soft * logs).sum(1).mean()), rel=1e-5)


def test_mixup_mixes_points_and_labels_alike() -> None:
    x, y, index = batch()
    recipe = Mixup(alpha=0.7)
    partner, share = recipe.pairs(index, 9)
    assert sorted(partner.tolist()) == list(range(12))
    assert bool((partner != torch.arange(12)).all())
    mixed = torch.stack(
        [s * x[i] + (1 - s) * x[j] for i, (s, j) in enumerate(zip(share, partner, strict=True))]
    )
    onehot = F.one_hot(y, 3).double()
    soft = share.double()[:, None] * onehot + (1 - share.double())[:, None] * onehot[partner]
    expected = -(soft * network().double()(mixed.double()).log_softmax(1)).sum(1).mean()
    loss = recipe.loss(Learner(network()), x, y, index, 9)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    shuffled, again = recipe.pairs(index[order], 9)
    assert torch.equal(index[order][shuffled], index[partner][order]), "partners do not depend on the order"
    assert torch.equal(again, share[order])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_s_shares_have_beta_s_moments(alpha: float) -> None:
    share = Mixup(alpha=alpha).pairs(torch.arange(20_000), 1)[1].double()
    variance = 1 / (4 * (2 * alpha + 1))
    assert float(share.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(share.var()) == pytest.approx(variance, rel=0.05)


def test_gaussian_noise_has_its_sigma_and_no_clipping() -> None:
    shown: list[Tensor] = []

    class Spy(Learner):
        def _forward(self, x: Tensor) -> Tensor:
            shown.append(x)
            return super()._forward(x)

    x, y, index = torch.zeros(40, 1, 5, 5), torch.arange(40) % 3, torch.arange(40)
    Gaussian(sigma=0.5).loss(Spy(network()), x, y, index, 3)
    assert float(shown[0].std()) == pytest.approx(0.5, rel=0.1)
    assert float(shown[0].min()) < -0.5


def test_attached_is_a_loss_with_the_gradients_it_was_given() -> None:
    first, second = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    value = attached((first * second[:2]).sum(), [first, second], [torch.tensor([2.0, 5.0]), None])
    (3 * value + first.sum()).backward()
    assert float(value.detach()) == 2
    assert first.grad is not None
    assert first.grad.tolist() == [7, 16]
    assert second.grad is None


def test_unlearned_leaves_statistics_and_graphs_alone() -> None:
    module = network()
    before = copy.deepcopy(module.state_dict())
    x, *_ = batch()
    value = module(x).sum()
    with unlearned(module):
        value = value + module(x + 1).sum()
    value.backward()
    assert int(module.state_dict()["1.num_batches_tracked"]) == int(before["1.num_batches_tracked"]) + 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *[
            (name, {"eps": 0.0})
            for name in ("fgsm-at", "fast", "free", "trades", "mart", "awp", "ensemble-at")
        ],
        ("trades", {"beta": -1.0}),
        ("trades", {"beta": math.nan}),
        ("mart", {"lam": math.inf}),
        ("mart", {"steps": 0}),
        ("awp", {"gamma": 0.0}),
        ("awp", {"base": "mart"}),
        ("awp", {"beta": -2.0}),
        ("fgsm-at", {"ratio": 1.0}),
        ("fgsm-at", {"norm": "l0"}),
        ("fast", {"alignment": -0.1}),
        ("fast", {"step_size": 0.0}),
        ("free", {"replays": 0}),
        ("gaussian", {"sigma": 0.0}),
        ("label-smoothing", {"smoothing": 1.0}),
        ("mixup", {"alpha": 0.0}),
        ("ensemble-at", {"models": ()}),
        ("ensemble-at", {"models": ""}),
        ("ensemble-at", {"models": "zoo:digits@none.safetensors"}),
    ],
)
def test_impossible_options_are_one_line(name: str, options: dict[str, Any]) -> None:
    needed = {"eps": 0.1, "models": "zoo:digits", "sigma": 0.1}
    given = {key: value for key, value in needed.items() if key in get(name).__dataclass_fields__} | options
    with pytest.raises(RobustError) as caught:
        get(name)(**given)
    line = str(caught.value)
    assert "\n" not in line
    [(key, value)] = options.items()
    if "none" not in str(value):
        assert isinstance(caught.value, ConfigError)
        assert line.startswith(f"{key}={value} cannot be trained with; it must be ") or key == "models"


def test_eps_and_step_size_rise_together() -> None:
    for recipe in (Fast(eps=0.3, step_size=0.2, warmup=2.0), TRADES(eps=0.3, step_size=0.2, warmup=2.0)):
        half: Any = recipe.at(1.0)
        assert (half.eps, half.step_size) == pytest.approx((0.15, 0.1))
        assert recipe.at(2.0) is recipe
