"""Losses: the papers' formulas written out row by row in float64, gradients, invariances, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robust.errors import RobustError
from robust.losses import REGISTRY, best_other, get

CLASSES = 6
Y = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1])
TARGETS = torch.tensor([1, 5, 0, 2, 3, 4, 5, 0])

Formula = Callable[[Tensor, int, int], Tensor]  # one row's logits, label and target


def sample(classes: int = CLASSES, seed: int = 1) -> Tensor:
    """(8, classes) float64 logits."""
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(8, classes, dtype=torch.float64, generator=generator)


def entropy(z: Tensor, k: int) -> Tensor:
    """−log softmax(z)_k."""
    return z.exp().sum().log() - z[k]


def other(z: Tensor, k: int) -> Tensor:
    """max over the classes that are not k."""
    return torch.cat((z[:k], z[k + 1 :])).max()


def ranked(z: Tensor, place: int) -> Tensor:
    """z_π(place), the largest first."""
    return z.sort(descending=True).values[place - 1]


def escaped(p: Tensor) -> Tensor:
    """The loss `escape` of the goal's probability."""
    return (p + 0.01).log() + 0.1 * p.log()


UNTARGETED: dict[str, Formula] = {
    "cross-entropy": lambda z, y, t: entropy(z, y),
    "margin": lambda z, y, t: other(z, y) - z[y],
    "dlr": lambda z, y, t: -(z[y] - other(z, y)) / (ranked(z, 1) - ranked(z, 3)),
    "escape": lambda z, y, t: escaped(1 - z.softmax(0)[y]),
}
TARGETED: dict[str, Formula] = {
    "cross-entropy": lambda z, y, t: -entropy(z, t),
    "margin": lambda z, y, t: z[t] - other(z, t),
    "dlr": lambda z, y, t: -(z[y] - z[t]) / (ranked(z, 1) - (ranked(z, 3) + ranked(z, 4)) / 2),
    "targeted-dlr": lambda z, y, t: -(z[y] - z[t]) / (ranked(z, 1) - (ranked(z, 3) + ranked(z, 4)) / 2),
    "combined-targeted": lambda z, y, t: entropy(z, y) - entropy(z, t),
    "escape": lambda z, y, t: escaped(z.softmax(0)[t]),
}
CASES = [(name, False) for name in UNTARGETED] + [(name, True) for name in TARGETED]


def by_hand(name: str, targeted: bool, logits: Tensor) -> Tensor:
    """The formula, row by row."""
    formula = (TARGETED if targeted else UNTARGETED)[name]
    return torch.stack([formula(z, int(y), int(t)) for z, y, t in zip(logits, Y, TARGETS, strict=True)])


@pytest.mark.parametrize(("name", "targeted"), CASES)
def test_loss_and_gradient_are_the_formula_s(name: str, targeted: bool) -> None:
    ours, theirs = sample().requires_grad_(), sample().requires_grad_()
    assert 0 < int((sample().argmax(1) == Y).sum()) < 8, "rows that are right and rows that are wrong"
    found = get(name)(ours, Y, TARGETS if targeted else None)
    expected = by_hand(name, targeted, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weights = torch.arange(1, 9, dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "targeted"), CASES)
def test_float32_is_the_formula_too(name: str, targeted: bool) -> None:
    found = get(name)(sample().float(), Y, TARGETS if targeted else None)
    torch.testing.assert_close(found.double(), by_hand(name, targeted, sample()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "targeted"), CASES)
def test_every_loss_is_unchanged_when_logits_are_shifted(name: str, targeted: bool) -> None:
    loss, targets = get(name), TARGETS if targeted else None
    torch.testing.assert_close(loss(sample() + 7, Y, targets), loss(sample(), Y, targets))


@pytest.mark.parametrize("scale", [1e-3, 40.0])
def test_only_dlr_is_unchanged_when_logits_are_scaled(scale: float) -> None:
    for name in ("dlr", "targeted-dlr"):
        torch.testing.assert_close(get(name)(scale * sample(), Y, TARGETS), get(name)(sample(), Y, TARGETS))
    torch.testing.assert_close(get("dlr")(scale * sample(), Y), get("dlr")(sample(), Y))
    for name in ("margin", "combined-targeted"):
        torch.testing.assert_close(
            get(name)(scale * sample(), Y, TARGETS), scale * get(name)(sample(), Y, TARGETS)
        )


def test_the_sign_of_margin_and_dlr_is_the_outcome() -> None:
    wrong = sample().argmax(1) != Y
    for name in ("margin", "dlr"):
        assert torch.equal(get(name)(sample(), Y) > 0, wrong)
    assert torch.equal(get("margin")(sample(), Y, TARGETS) > 0, sample().argmax(1) == TARGETS)


def test_kl_is_the_divergence_from_the_clean_points() -> None:
    clean, logits = sample(), sample(seed=2).requires_grad_()
    p = clean.exp() / clean.exp().sum(1, keepdim=True)
    q = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = (p * (p / q).log()).sum(1)
    found = get("kl")(logits, Y, None, clean)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(gradient, q - p, rtol=1e-9, atol=1e-9)
    assert bool((found > 0).all())
    torch.testing.assert_close(get("kl")(clean, Y, None, clean), torch.zeros(8, dtype=torch.float64))


def test_kl_stays_finite_where_a_probability_vanishes() -> None:
    clean = torch.tensor([[300.0, 0.0, -300.0]])
    assert bool(get("kl")(torch.zeros(1, 3), Y[:1], None, clean).isfinite().all())
    assert bool(get("kl")(clean, Y[:1], None, clean).isfinite().all())


def test_best_other_leaves_the_label_out() -> None:
    logits = torch.tensor([[5.0, 1.0, 3.0], [5.0, 1.0, 3.0]])
    assert best_other(logits, torch.tensor([0, 1])).tolist() == [3.0, 5.0]
    assert get("margin")(logits, torch.tensor([0, 1])).tolist() == [-2.0, 4.0]


@pytest.mark.parametrize(
    ("name", "classes", "targeted", "message"),
    [
        ("dlr", 2, False, "dlr needs 3 classes, the model has 2; use margin"),
        ("targeted-dlr", 3, True, "targeted-dlr needs 4 classes, the model has 3; use combined-targeted"),
        ("dlr", 3, True, "targeted-dlr needs 4 classes, the model has 3; use combined-targeted"),
        ("targeted-dlr", 6, False, "targeted-dlr needs target classes; use dlr where there are none"),
        (
            "combined-targeted",
            6,
            False,
            "combined-targeted needs target classes; use cross-entropy where there are none",
        ),
        ("kl", 6, False, "kl needs the clean points' logits as its reference"),
    ],
)
def test_a_loss_says_what_it_lacks(name: str, classes: int, targeted: bool, message: str) -> None:
    y, targets = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    with pytest.raises(RobustError) as error:
        get(name)(sample(classes), y, targets if targeted else None)
    assert str(error.value) == message


def test_the_smallest_numbers_of_classes_work() -> None:
    y, targets = torch.zeros(8, dtype=torch.long), torch.ones(8, dtype=torch.long)
    for name, classes in (
        ("dlr", 3),
        ("targeted-dlr", 4),
        ("margin", 2),
        ("cross-entropy", 2),
        ("combined-targeted", 2),
    ):
        loss = get(name)(sample(classes), y, targets if "targeted" in name else None)
        assert loss.shape == (8,)
        assert bool(loss.isfinite().all())


def test_equal_logits_give_finite_losses_and_gradients() -> None:
    y, targets = torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long)
    for name in REGISTRY:
        logits = torch.zeros(2, 5, requires_grad=True)
        loss = get(name)(logits, y, targets, torch.zeros(2, 5))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert bool(loss.isfinite().all() & gradient.isfinite().all()), name
