"""Inversions against closed forms: quotients, labels, slopes, and what noise, compression and averages leave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust import Classifier
from robust.attacks.privacy import get
from robust.attacks.privacy.inversion import Problem
from robust.attacks.privacy.labels import counted
from robust.errors import ConfigError, RobustError
from robust.inversion import Protocol, Watched
from robust.inversion_scores import best_guess
from robust.similarity import matched, psnr
from tests.attacks.privacy.inversion_parts import SHAPE, digits, linear, make, perceptron, relu, seen, sigmoid

NORMALISED = {"mean": 0.3, "std": 0.25, "bounds": (-1.0, 1.0)}


def recovered(
    name: str, clf: Classifier, rows: slice, protocol: Protocol | None = None, **settings: Any
) -> Tensor:
    """PSNR of each digit, each matched with the recovered image that is nearest."""
    observe, x, _ = seen(clf, rows, protocol)
    found = get(name)(**settings)(clf, observe, shape=SHAPE, protocol=protocol)
    return psnr(found.x[matched(found.x, x)], x, clf.bounds[1] - clf.bounds[0])


@pytest.mark.parametrize("build", [linear, perceptron])
@pytest.mark.parametrize("options", [{}, NORMALISED])
def test_a_first_linear_layer_gives_its_input_away(
    build: Callable[[], nn.Module], options: dict[str, Any]
) -> None:
    for row in range(3):
        assert recovered("analytic-fc", make(build, **options), slice(row, row + 1)).min() > 60


@pytest.mark.parametrize(
    "protocol", [Protocol(clip=0.01), Protocol(steps=3, lr=0.05), Protocol(clip=0.1, steps=2, lr=0.1)]
)
def test_clipping_and_local_steps_cancel_out_of_the_quotient(protocol: Protocol) -> None:
    assert recovered("analytic-fc", make(perceptron), slice(0, 1), protocol).min() > 60


def test_units_that_one_sample_alone_activates_give_samples_of_a_batch_away() -> None:
    def trap() -> nn.Module:
        net = perceptron()
        first: Any = net[1]
        with torch.no_grad():  # units that few inputs activate, as a dishonest server would choose them
            first.bias.copy_(-(first.weight @ digits()[0].flatten(1).T).quantile(0.9, dim=1))
        return net

    found = recovered("analytic-fc", make(trap), slice(0, 4), Protocol(batch=4))
    assert (found > 60).sum() >= 2


def test_the_quotient_needs_a_first_linear_layer_with_bias() -> None:
    for build, begins in (
        (sigmoid, "Conv2d"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10, False)), "Linear"),
    ):
        clf = make(build)
        with pytest.raises(RobustError, match=f"first layer is linear, with a bias, .* begins with {begins}"):
            get("analytic-fc")()(clf, seen(clf, slice(0, 1))[0], shape=SHAPE)


@pytest.mark.parametrize("bias", [True, False])
def test_the_label_of_one_sample_is_read_exactly_whatever_its_class_is(bias: bool) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10, bias=bias))

    clf, y = make(build), digits()[1]
    for label in range(10):
        row = int((y == label).nonzero()[0])
        observe = seen(clf, slice(row, row + 1))[0]
        assert get("idlg")(steps=1)(clf, observe, shape=SHAPE).y.tolist() == [label]


def test_the_labels_of_a_batch_are_read_as_counts_also_when_clipped() -> None:
    clf = make(sigmoid)
    for first in (0, 8, 16):
        rows = slice(first, first + 8)
        for protocol in (Protocol(batch=8), Protocol(batch=8, clip=0.1)):
            observe, _, y = seen(clf, rows, protocol)
            told = get("idlg")(steps=1)(clf, observe, shape=SHAPE, protocol=protocol).y
            both = (torch.bincount(part, minlength=10) for part in (told, y))
            assert torch.minimum(*both).sum() >= 7
    assert counted(torch.tensor([1.6, 0.1, 2.4, -0.2]), 4).tolist() == [0, 0, 2, 2]
    assert counted(torch.tensor([2.0, 2.0]), 3).bincount(minlength=2).sum() == 3


def test_labels_that_no_last_layer_tells_are_asked_for() -> None:
    clf = make(lambda: nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten(), nn.PReLU(1)))
    observe = seen(clf, slice(0, 1))[0]
    with pytest.raises(RobustError, match="labels cannot be read from the gradient; give labels, or use dlg"):
        get("idlg")()(clf, observe, shape=SHAPE)
    assert get("dlg")(steps=20)(clf, observe, shape=SHAPE).x.shape == (1, *SHAPE)


@pytest.mark.parametrize(
    ("name", "build", "protocol"),
    [
        ("dlg", sigmoid, Protocol()),
        ("idlg", sigmoid, Protocol(batch=2, clip=0.3)),
        ("inverting-gradients", sigmoid, Protocol(batch=2)),
        ("inverting-gradients", relu, Protocol(steps=2)),
        ("inverting-gradients", sigmoid, Protocol(keep=0.3)),
    ],
)
def test_slopes_of_the_objective_equal_finite_differences(
    name: str, build: Callable[[], nn.Module], protocol: Protocol
) -> None:
    clf = make(build)
    observe, x, y = seen(clf, slice(0, protocol.batch), protocol)
    model = Watched(clf, torch.float64)
    values = torch.cat([part.double().flatten() for part in observe()])
    sent = values != 0 if protocol.keep < 1 else None
    problem = Problem(model, values, sent, protocol, SHAPE, 10, y, None, 0, 0)
    attack, p = get(name)(precision="float64"), problem.one_hot(y)
    u = (
        (0.2 + 0.6 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)))
        .double()
        .requires_grad_()
    )
    with clf.session():
        (slope,) = torch.autograd.grad(attack.objective(problem, u, p), u)
        for seed in range(3):
            way = torch.randn(u.shape, generator=torch.Generator().manual_seed(seed)).double()
            step = 1e-6
            ends = [float(attack.objective(problem, u.detach() + sign * step * way, p)) for sign in (1, -1)]
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(
                float((slope * way).sum()), rel=1e-4, abs=1e-8
            )


@pytest.mark.parametrize("name", ["dlg", "idlg"])
def test_a_digit_is_seen_again_in_the_gradient_of_a_sigmoid_net(name: str) -> None:
    assert recovered(name, make(sigmoid), slice(0, 1), steps=200).min() > 25
    assert recovered(name, make(sigmoid, **NORMALISED), slice(1, 2), steps=200).min() > 25


def test_a_digit_is_seen_again_in_the_gradient_of_a_relu_net() -> None:
    assert recovered("inverting-gradients", make(relu), slice(0, 1), steps=400).min() > 25


def test_two_digits_are_seen_again_in_their_mean_gradient() -> None:
    assert recovered("idlg", make(sigmoid), slice(0, 2), Protocol(batch=2), steps=500).min() > 25


@pytest.mark.parametrize("protocol", [Protocol(keep=0.5), Protocol(bits=8), Protocol(steps=2, lr=0.01)])
def test_a_digit_is_seen_again_in_what_a_client_sends(protocol: Protocol) -> None:
    guess = best_guess(digits()[0][20:]).image
    x = digits()[0][:1]
    found = recovered("inverting-gradients", make(relu), slice(0, 1), protocol, steps=300)
    assert found.min() > psnr(guess[None], x) + 3


@pytest.mark.parametrize("restarts", [1, 4])
def test_noise_of_a_tenth_of_the_clip_hides_the_digit_also_from_more_starts(restarts: int) -> None:
    """Of a wide net, whose gradient has many entries for the noise to fall on."""

    def wide() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(1024, 10),
        )  # fmt: skip

    x, _ = digits()
    guess = best_guess(x[20:]).image
    for row in range(2):
        found = recovered(
            "inverting-gradients", make(wide), slice(row, row + 1), Protocol(clip=1.0, noise=0.1), steps=60,
            restarts=restarts,
        )  # fmt: skip
        assert found.max() < psnr(guess[None], x[row : row + 1]) + 1


def test_stacked_restarts_find_what_each_one_finds_alone() -> None:
    clf = make(relu)
    observe = seen(clf, slice(0, 1))[0]
    one, three = (
        get("inverting-gradients")(steps=40, restarts=count, precision="float64")(clf, observe, shape=SHAPE)
        for count in (1, 3)
    )
    assert torch.allclose(three.track[0], one.track[0], rtol=1e-4)
    assert three.objective == pytest.approx(float(three.track[:, -1].min()), rel=1e-5)
    assert three.objective <= one.objective * (1 + 1e-6)
    assert (one.evaluations, three.evaluations) == (40, 120)


def test_a_class_is_drawn_until_the_model_is_sure() -> None:
    from robust import load_model

    clf = load_model("zoo:digits", device="cpu")
    assert isinstance(clf, Classifier)
    found = get("model-inversion")(steps=60)(clf, torch.arange(10), shape=SHAPE)
    assert (clf.logits(found.x).argmax(1) == torch.arange(10)).all()
    with pytest.raises(ConfigError, match=r"class 10, and .* has 10"):
        get("model-inversion")(steps=1)(clf, torch.tensor([10]), shape=SHAPE)
