"""The white-box face: normalisation, counts, a model left as it was found, diagnoses, and its digest."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust.classifier import FLOAT_NOISE, Classifier, RobustWarning
from robust.errors import DataError, ModelError

SHAPE = (3, 4, 5)


def points(n: int = 20, high: float = 1.0) -> Tensor:
    """Points of the box [0, high]."""
    return high * torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolution, batch norm and dropout: everything whose state a careless wrapper changes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.drop, self.linear = nn.Dropout(0.5), nn.Linear(4 * 20, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.linear(self.drop(self.norm(self.conv(x)).relu().flatten(1)))
        return logits


class Output(nn.Module):
    """A network whose output is changed by a function of (logits, x)."""

    def __init__(self, change: Callable[[Tensor, Tensor], object]) -> None:
        super().__init__()
        self.net, self.change = Net(), change

    def forward(self, x: Tensor) -> object:
        """The changed output."""
        return self.change(self.net(x), x)


def checked(module: nn.Module, x: Tensor | None = None) -> Classifier:
    """A classifier whose diagnosis warned of nothing."""
    clf = Classifier(module.eval())
    assert clf.check(points() if x is None else x) == []
    return clf


def diagnosis(module: nn.Module) -> tuple[Classifier, str]:
    """A classifier and its one warning, which is also raised as a `RobustWarning` and not raised twice."""
    clf = Classifier(module)
    with pytest.warns(RobustWarning) as raised:
        found = clf.check(points())
    assert [str(item.message) for item in raised] == found
    assert clf.check(points()) == found
    assert len(found) == 1, found
    assert "\n" not in found[0]
    return clf, found[0]


# ------------------------------------------------------------------------------------------------------- normalisation


def test_normalisation_is_inside() -> None:
    net, x = Net().eval(), points(high=255)
    mean, std = (100.0, 120.0, 130.0), (50.0, 60.0, 70.0)
    clf = Classifier(net, bounds=(0, 255), mean=mean, std=std)
    z = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(3)], dim=1)
    torch.testing.assert_close(clf.logits(x), net(z).detach())
    one = Classifier(net, bounds=(0, 255), mean=10.0, std=3.0)
    torch.testing.assert_close(one.logits(x), net((x - 10) / 3).detach())
    torch.testing.assert_close(Classifier(net).logits(x), net(x).detach())


def test_gradients_are_those_of_x_and_not_of_its_normalised_form() -> None:
    clf, x = Classifier(Net().eval(), mean=0.5, std=0.25), points(3).double()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(clf(x)[:, 0].sum(), x)
    step = torch.zeros_like(x)
    step[:, 1, 2, 3] = 1e-3
    with torch.no_grad():
        slope = (clf(x + step)[:, 0] - clf(x - step)[:, 0]) / 2e-3
    torch.testing.assert_close(gradient[:, 1, 2, 3].float(), slope, rtol=2e-2, atol=2e-3)


def test_half_and_double_modules_get_their_dtype_and_answer_in_float32() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        clf = Classifier(Net().eval().to(dtype))
        assert clf.logits(points()).dtype == torch.float32
        assert next(clf.module.parameters()).dtype == dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": (1.0, 0.0)}, "bounds=(1.0, 0.0) is no box"),
        ({"bounds": (0.0, float("nan"))}, "is no box"),
        ({"std": 0.0}, "std=0.0 finite and positive"),
        ({"std": (1.0, -1.0, 1.0)}, "finite and positive"),
        ({"std": float("nan")}, "finite and positive"),
        ({"mean": float("inf")}, "mean=inf must be finite"),
    ],
)
def test_impossible_normalisation_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        Classifier(Net(), **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_statistics_of_other_channels_are_an_error_and_no_broadcast() -> None:
    clf = Classifier(Net().eval(), mean=(0.1, 0.2, 0.3))
    with pytest.raises(ModelError, match=r"^mean has 3 values for 1 channels; give one each, or one$"):
        clf.logits(torch.rand(2, 1, 4, 5))


# ---------------------------------------------------------------------------------------- the model as it was found


def snapshot(module: nn.Module) -> dict[str, object]:
    """Everything that must be the same afterwards."""
    return {
        "modes": [part.training for part in module.modules()],
        "flags": [parameter.requires_grad for parameter in module.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "state": {name: value.tolist() for name, value in module.state_dict().items()},
        "objects": {name: id(value) for name, value in module.named_buffers()},
    }


def mixed() -> Net:
    """A network in no uniform state: modes, flags and gradients differ between its parts."""
    net = Net().train()
    net.drop.eval()
    net.conv.weight.requires_grad_(False)
    net.linear.weight.grad = torch.ones_like(net.linear.weight)
    return net


class Careless(Net):
    """Writes into one buffer and replaces another at every forward, even in eval mode."""

    seen: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("last", torch.zeros(2))
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or an error after the damage is done."""
        self.seen += 1
        self.last = x.flatten()[:2].detach().clone()
        if self.fails:
            raise RuntimeError("no memory left")
        return super().forward(x)


def test_the_model_is_left_as_it_was_found() -> None:
    for net in (mixed(), Careless().train()):
        clf, before = Classifier(net), snapshot(net)
        x = points().requires_grad_()
        clf(x).sum().backward()
        assert x.grad is not None
        assert bool(x.grad.any())
        clf.logits(x)
        with pytest.warns(RobustWarning):
            clf.check(x.detach())
        with clf.session():
            assert not any(part.training for part in net.modules())
            assert not any(parameter.requires_grad for parameter in net.parameters())
            clf(x).sum().backward()
        assert snapshot(net) == before


def test_the_model_is_left_as_it_was_found_after_an_error() -> None:
    net = Careless().train()
    net.fails = True
    clf, before = Classifier(net), snapshot(net)
    with pytest.raises(RuntimeError, match="no memory left"):
        clf.logits(points())
    assert snapshot(net) == before
    with pytest.raises(KeyboardInterrupt), clf.session():
        raise KeyboardInterrupt
    assert snapshot(net) == before
    net.fails = False
    assert clf.logits(points()).shape == (20, 4), "and it is usable again"


def test_sessions_nest() -> None:
    net = Net().train()
    clf = Classifier(net)
    with clf.session():
        with clf.session():
            assert not net.training
        assert not net.training, "the inner one does not end the outer one"
        clf.logits(points())
        assert not net.training
    assert net.training


# ------------------------------------------------------------------------------------------------------ counts, shapes


def test_forwards_are_counted_in_samples() -> None:
    clf = Classifier(Net().eval())
    before = clf.known_classes
    with pytest.raises(ModelError, match="known after the first forward"):
        _ = clf.classes
    clf.logits(points(7))
    clf(points(5))
    assert clf.cost.forwards == 12
    assert (before, clf.known_classes, clf.classes) == (None, 4, 4)
    clf.check(points(40))
    assert clf.cost.forwards == 12 + 2 * 16, "a diagnosis looks twice at sixteen points"


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda z, x: z[:, :, None], "(5, 4, 1)"),
        (lambda z, x: z[0], "(4,)"),
        (lambda z, x: z[:3], "(3, 4)"),
        (lambda z, x: (z, x), "tuple"),
    ],
)
def test_a_wrong_output_is_one_line(change: Callable[[Tensor, Tensor], object], found: str) -> None:
    clf = Classifier(Output(change).eval(), name="mine")
    with pytest.raises(ModelError) as error:
        clf.logits(points(5))
    assert str(error.value) == f"mine returned {found}; a classifier returns logits (5, classes)"


# ---------------------------------------------------------------------------------------------------------- diagnoses


def test_a_sound_model_has_no_diagnosis() -> None:
    clf = checked(Net())
    assert not clf.randomised
    assert clf.warnings == []
    assert clf.check(points(0)) == []


def test_a_model_in_train_mode_is_named_and_evaluated_in_eval_mode() -> None:
    clf, line = diagnosis(Net().train())
    assert "train mode" in line
    assert not clf.randomised, "its dropout is off"
    assert clf.module.training
    torch.testing.assert_close(clf.logits(points()), Net().eval()(points()).detach())


def test_a_softmax_model_is_named() -> None:
    clf, line = diagnosis(Output(lambda z, x: z.softmax(1)).eval())
    assert "probabilities" in line
    assert not clf.randomised
    checked(Output(lambda z, x: z.log_softmax(1)))


def test_a_randomised_model_is_named_and_float_noise_is_not() -> None:
    clf, line = diagnosis(Output(lambda z, x: z + 0.05 * torch.randn_like(z)).eval())
    assert "randomised" in line
    assert clf.randomised
    quiet = checked(Output(lambda z, x: z + FLOAT_NOISE * z.abs().max() * torch.rand_like(z)))
    assert not quiet.randomised


def test_some_nan_is_named_and_nan_everywhere_is_an_error() -> None:
    clf, line = diagnosis(Output(lambda z, x: torch.where(x[:, 0, 0, :1] > 0.5, z, torch.nan)).eval())
    assert "NaN" in line
    assert "misclassified" in line
    assert not clf.randomised
    for change in (lambda z, x: z * torch.nan, lambda z, x: z + torch.inf):
        broken = Classifier(Output(change).eval(), name="broken")
        with pytest.raises(ModelError, match=r"^broken returns NaN or infinite logits on every input"):
            broken.check(points())


def test_one_logit_is_no_classifier() -> None:
    with pytest.raises(ModelError, match=r"^Output returns 1 logit; a classifier returns one per class$"):
        Classifier(Output(lambda z, x: z[:, :1]).eval()).check(points())


@pytest.mark.parametrize(
    "error", [RuntimeError, ValueError, AssertionError, KeyError, AttributeError, ZeroDivisionError]
)
def test_a_model_that_fails_is_one_line(error: type[Exception]) -> None:
    def fail(z: Tensor, x: Tensor) -> Tensor:
        raise error("shapes do not match\nand more\nlines")

    clf = Classifier(Output(fail).eval(), name="mine")
    for _ in range(2):  # a model that failed its check has not been checked
        with pytest.raises(ModelError) as raised:
            clf.check(points())
        assert str(raised.value).startswith("mine fails on inputs of shape (16, 3, 4, 5): ")
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("bounds", "value", "advice"),
    [
        ((0.0, 1.0), 255.0, "divide by 255 or set bounds=(0, 255)"),
        ((0.0, 1.0), -1.7, "normalised already"),
        ((0.0, 1.0), 1.0001, "outside the box [0.0, 1.0]"),
        ((0.0, 255.0), 256.0, "outside the box [0.0, 255.0]"),
        ((0.0, 1.0), float("nan"), "remove the NaN"),
        ((0.0, 1.0), float("inf"), "outside the box"),
    ],
)
def test_points_out_of_the_box_are_one_line(bounds: tuple[float, float], value: float, advice: str) -> None:
    clf, x = Classifier(Net().eval(), bounds=bounds), points()
    x[7, 1, 2, 3] = value
    with pytest.raises(DataError) as error:
        clf.check(x)
    assert str(error.value).startswith("inputs span [")
    assert advice in str(error.value)
    assert "\n" not in str(error.value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clf.require_box(points())


# ------------------------------------------------------------------------------------------------------ digest


def test_the_digest_is_the_model_s_identity() -> None:
    def digest(change: Callable[[Net], object] = lambda net: None, **options: Any) -> str:
        net = Net()
        with torch.no_grad():
            change(net)
        return Classifier(net, **options).digest()

    assert digest() == digest() == digest(mean=0.0, std=1.0, bounds=(0, 1), name="other")
    digests = [
        digest(),
        digest(lambda net: net.conv.weight[0, 0, 0, 0].add_(1e-6)),
        digest(lambda net: net.norm.state_dict()["running_mean"].add_(1e-6)),
        digest(lambda net: net.linear.bias.copy_(net.linear.bias.flip(0))),
        digest(mean=0.1),
        digest(mean=(0.1, 0.1, 0.2)),
        digest(std=0.5),
        digest(bounds=(0, 2)),
        digest(lambda net: net.to(torch.float64)),
    ]
    assert len(set(digests)) == len(digests)
    assert all(len(text) == 64 and int(text, 16) >= 0 for text in digests)


def test_using_a_model_does_not_change_its_digest() -> None:
    clf = Classifier(Net().eval())
    before = clf.digest()
    clf(points().requires_grad_()).sum().backward()
    assert clf.digest() == before
