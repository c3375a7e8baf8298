"""Private gradients: clipped sums equal a loop over samples in float64, whatever the layer, dtype and batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from robust.defenses.privacy.gradients.engine import rule_of
from robust.errors import ModelError
from tests.defenses.privacy_parts import LAYERS, clipped_sum, distance, gradients, length, losses, private
from tests.defenses.privacy_parts import sample_gradients as by_loop

BOUNDS = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 0.05}


def middle(model: nn.Module, x: Tensor) -> float:
    """A bound that clips about half of the samples."""
    lengths = sorted(length(one) for one in by_loop(model, x))
    return lengths[len(lengths) // 2] * 0.99


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # of the loop's
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_clipped_sum_is_that_of_a_loop(name: str, dtype: torch.dtype, reduction: str) -> None:
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    model, x = make().to(dtype), inputs(5)
    x = x.to(dtype) if x.is_floating_point() else x
    bound = middle(model, x)
    expected = clipped_sum(model, x, bound)
    optimizer = private(model, max_grad_norm=bound, loss_reduction=reduction)
    each = losses(model(x))
    (each.mean() if reduction == "mean" else each.sum()).backward()
    optimizer.step()
    assert distance(gradients(model), expected) < BOUNDS[dtype]


@pytest.mark.parametrize("rows", [1, 2, 17])
def test_input_gradients_and_depth_are_right_too(rows: int) -> None:
    """A network of every kind of layer: each rule's input gradient carries the ones before it."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.InstanceNorm2d(16, affine=True), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3, padding=1), nn.Flatten(2),
        nn.Conv1d(16, 6, 3, dilation=2), nn.LayerNorm(12), nn.Linear(12, 7), nn.PReLU(), nn.Flatten(), nn.Linear(42, 3),
    )  # fmt: skip
    x = torch.randn(rows, 3, 8, 8)
    expected = clipped_sum(model, x, 4.0)
    optimizer = private(model, max_grad_norm=4.0)
    losses(model(x)).mean().backward()
    optimizer.step()
    assert distance(gradients(model), expected) < 2e-5


@pytest.mark.parametrize("name", ["conv2d", "conv2d 3x3", "group norm", "conv2d in groups", "conv2d wide"])
def test_channels_last_is_the_same(name: str) -> None:
    make, inputs = LAYERS[name]
    torch.manual_seed(0)
    model, x = make(), inputs(4)
    expected = clipped_sum(model, x, 1.0)
    model.to(memory_format=torch.channels_last)
    optimizer = private(model)
    losses(model(x.contiguous(memory_format=torch.channels_last))).mean().backward()
    optimizer.step()
    assert distance(gradients(model), expected) < 1e-5


def test_autocast_and_the_inputs_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2))
    plain, x = copy.deepcopy(model), torch.randn(3, 3, 5, 5, requires_grad=True)
    (expected,) = torch.autograd.grad(losses(plain(x)).mean(), x)
    optimizer = private(model)
    (found,) = torch.autograd.grad(losses(model(x)).mean(), x)  # keeps nothing for the optimizer
    assert torch.allclose(found, expected, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        losses(model(x)).mean().backward()
    optimizer.step()
    assert distance(gradients(model), clipped_sum(plain, x.detach(), 1.0)) < 0.03
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("clipping", ["flat", "per_layer", "automatic", "adaptive"])
def test_a_sample_that_is_not_finite_adds_nothing(clipping: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.GroupNorm(1, 2), nn.Flatten(), nn.Linear(8, 3))
    x = torch.randn(4, 1, 3, 3)
    spoilt = torch.cat((x, torch.full((1, 1, 3, 3), torch.nan), torch.full((1, 1, 3, 3), torch.inf)))
    found = []
    for batch in (x, spoilt):
        one = copy.deepcopy(model)
        optimizer = private(one, clipping=clipping, loss_reduction="sum")
        losses(one(batch)).sum().backward()
        optimizer.step()
        found.append(gradients(one))
    assert all(torch.isfinite(g).all() for g in found[1])
    assert distance(found[1], found[0]) < 1e-6


def test_two_looks_at_the_same_samples_are_one_gradient() -> None:
    """As in TRADES: both outputs in one loss, so that a sample's gradient is clipped once."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    exact = copy.deepcopy(model).double()
    expected = [torch.zeros_like(p) for p in exact.parameters()]
    for row in x.double():
        loss = losses(exact(row[None])).sum() + losses(exact(2 * row[None])).sum()
        one = list(torch.autograd.grad(loss, list(exact.parameters())))
        for total, g in zip(expected, one, strict=True):
            total += g * min(1.0, 1.0 / length(one))
    optimizer = private(model)
    (losses(model(x)).mean() + losses(model(2 * x)).mean()).backward()
    optimizer.step()
    assert distance(gradients(model), expected) < 1e-6


def test_a_second_backward_through_one_forward_is_refused() -> None:
    model = nn.Linear(2, 2)
    private(model)
    out = losses(model(torch.randn(3, 2))).mean()
    out.backward(retain_graph=True)
    with pytest.raises(ModelError, match="twice"):
        out.backward()


def test_a_layer_that_does_not_see_the_batch_is_named() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.where = nn.Embedding(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.where(torch.arange(4))  # type: ignore[no-any-return]

    model = Positions()
    private(model)
    with pytest.raises(ModelError, match=r"where gets an input \(4,\) in a batch of 2"):
        model(torch.randn(3, 4, 2))


@pytest.mark.parametrize("length", [3, 4])
def test_positions_are_not_taken_for_samples_even_where_they_are_as_many(length: int) -> None:
    class PositionsFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]

    model = PositionsFirst()
    private(model)
    with pytest.raises(ModelError, match=r"inner gets an input .* its first dimension must be the batch"):
        model(torch.randn(4, length, 2))


def test_copies_of_a_private_model_are_plain_and_evaluation_is_untouched() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    x, plain = torch.randn(2, 3, 3, 3), copy.deepcopy(model)
    optimizer = private(model)
    copied = copy.deepcopy(model)
    losses(copied(x)).mean().backward()
    assert all(p.grad is not None for p in copied.parameters())
    assert model.state_dict().keys() == plain.state_dict().keys()
    model.eval()
    assert torch.equal(model(x), plain(x))
    optimizer.engine.release()
    model.train()
    losses(model(x)).mean().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_layers_of_their_own_forward_have_no_rule() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    assert rule_of(nn.Conv2d(1, 1, 1)) is not None
    assert rule_of(Standardised(1, 1, 1)) is None
    torch.manual_seed(0)
    model, x = Standardised(2, 3, 2), torch.randn(4, 2, 4, 4)
    expected = clipped_sum(model, x, 1.0)
    optimizer = private(model)
    losses(model(x)).mean().backward()
    optimizer.step()
    assert distance(gradients(model), expected) < 1e-5
