"""Losses with their gradients in closed form, against autograd through `robust.losses`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from robust import cuda_ops, losses
from tests.cuda_ops.attack_inputs import odd_logits

FORMS = [
    *((name, False) for name in ("cross-entropy", "margin", "dlr", "kl")),
    *((name, True) for name in ("cross-entropy", "margin", "dlr", "targeted-dlr", "combined-targeted", "kl")),
]


def by_autograd(
    name: str, logits: Tensor, y: Tensor, targets: Tensor | None, clean: Tensor
) -> tuple[Tensor, Tensor]:
    """The value, and its gradient by backpropagation."""
    leaf = logits.clone().requires_grad_()
    value = losses.get(name)(leaf, y, targets, clean)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def sample(classes: int, rows: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Float64 logits, labels, targets (one of them the label itself), clean logits."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(2, rows, classes, generator=generator, dtype=torch.float64)
    y, targets = torch.randint(classes, (2, rows), generator=generator)
    targets[0] = y[0]
    return logits[0], y, targets, logits[1]


@pytest.mark.parametrize(("name", "aimed"), FORMS)
@pytest.mark.parametrize("classes", [2, 3, 4, 10, 37])
def test_value_and_gradient_are_autograd_s(name: str, aimed: bool, classes: int) -> None:
    logits, y, targets, clean = sample(classes)
    if classes < {"dlr": 4 if aimed else 3, "targeted-dlr": 4}.get(name, 2):
        return
    aims = targets if aimed else None
    expected = by_autograd(name, logits, y, aims, clean)
    before = logits.clone(), clean.clone()
    found = cuda_ops.loss_gradient(name, logits, y, aims, clean)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(before[0], logits)
    assert torch.equal(before[1], clean)
    single = cuda_ops.loss_gradient(name, logits.float(), y, aims, clean.float())
    assert single[0].dtype == single[1].dtype == torch.float32
    for mine, theirs in zip(single, expected, strict=True):
        assert float((mine - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize(("name", "aimed"), FORMS)
def test_equal_logits_share_the_gradient_as_in_autograd(name: str, aimed: bool) -> None:
    logits = torch.tensor(
        [[1.0, 2, 2, 0, 2, -3], [0, 0, 0, 0, 0, 0], [3, 1, 1, -1, -2, -3], [1, 1, 3, 2, 0, -1]]
    )
    y, targets = torch.tensor([0, 1, 0, 2]), torch.tensor([3, 0, 1, 3])
    aims = targets if aimed else None
    found = cuda_ops.loss_gradient(name, logits, y, aims, logits.flip(1))
    expected = by_autograd(name, logits, y, aims, logits.flip(1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "aimed"), FORMS)
def test_rows_that_are_not_finite_have_the_loss_s_value(name: str, aimed: bool) -> None:
    logits, y, targets, clean = odd_logits()
    aims = targets if aimed else None
    value, gradient = cuda_ops.loss_gradient(name, logits, y, aims, clean)
    expected = losses.get(name)(logits, y, aims, clean)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert int(value.isnan().sum()) > 0, "the rows with NaN say so"
    assert gradient.shape == logits.shape


@pytest.mark.parametrize(
    ("name", "classes", "aimed", "message"),
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
        (
            "hinge",
            6,
            False,
            "no closed gradient of the loss 'hinge'; known are cross-entropy, margin, dlr, targeted-dlr, "
            "combined-targeted, kl",
        ),
    ],
)
def test_a_loss_says_what_it_lacks(name: str, classes: int, aimed: bool, message: str) -> None:
    labels = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"needs|known") as error:
        cuda_ops.loss_gradient(name, torch.zeros(2, classes), labels, labels if aimed else None)
    assert str(error.value) == message


@pytest.mark.parametrize(("name", "aimed"), FORMS)
def test_a_batch_without_rows_passes(name: str, aimed: bool) -> None:
    labels = torch.zeros(0, dtype=torch.long)
    value, gradient = cuda_ops.loss_gradient(
        name, torch.zeros(0, 5), labels, labels if aimed else None, torch.zeros(0, 5)
    )
    assert value.shape == (0,)
    assert gradient.shape == (0, 5)
