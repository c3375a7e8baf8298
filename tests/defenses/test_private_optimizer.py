"""Private optimizers: any torch optimizer, parts of batches, empty batches, clipping, refusals and exact resume."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from robust.defenses.privacy import Adaptive, ExponentialDecay, StepDecay, TimeDecay, fix, make_private
from robust.errors import ConfigError, ModelError, RunError
from tests.defenses.privacy_parts import distance, gradients, length, losses, private, sample_gradients

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1),
}


def net() -> nn.Sequential:
    """A small network, always the same."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2))


def data(rows: int = 40) -> TensorDataset:
    """Samples for it."""
    return TensorDataset(torch.randn(rows, 1, 3, 3, generator=torch.Generator().manual_seed(1)))


def train(model: nn.Module, optimizer: Any, loader: Any, epochs: int = 1) -> list[int]:
    """The loop that people write; the sizes of the parts."""
    sizes = []
    for _ in range(epochs):
        for (x,) in loader:
            optimizer.zero_grad()
            losses(model(x)).mean().backward()
            optimizer.step()
            sizes.append(len(x))
    return sizes


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_wrapped_optimizer_sees_nothing_but_the_private_gradient(name: str) -> None:
    """Three steps of it equal three steps of the bare optimizer on the same gradients."""
    model, x = net(), data(8).tensors[0]
    twin = copy.deepcopy(model)
    bare = OPTIMIZERS[name](twin.parameters())
    _, optimizer, _ = make_private(
        model, OPTIMIZERS[name](model.parameters()), None, noise_multiplier=0.5, expected_batch_size=8
    )
    for _ in range(3):
        optimizer.zero_grad()
        losses(model(x)).mean().backward()
        optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = None if p.grad is None else p.grad.clone()
        bare.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_learning_rate_schedulers_take_it() -> None:
    model = net()
    optimizer = private(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    losses(model(data(4).tensors[0])).mean().backward()
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("most", [1, 3, 7, 100])
@pytest.mark.parametrize("clipping", ["flat", "automatic", "adaptive"])
def test_batches_in_parts_give_the_same_weights(most: int, clipping: str) -> None:
    ends = []
    for size in (None, most):
        model = net()
        _, optimizer, loader = make_private(
            model, torch.optim.Adam(model.parameters(), 0.01), DataLoader(data(), 8), seed=5,
            noise_multiplier=1.0, max_physical_batch_size=size, clipping=clipping,
        )  # fmt: skip
        sizes = train(model, optimizer, loader, 2)
        assert size is None or max(sizes) <= size
        assert optimizer.steps == 2 * len(loader) == 10
        ends.append(list(model.parameters()))
    assert distance([p.detach() for p in ends[0]], [p.detach().double() for p in ends[1]]) < 1e-5


def test_fixed_batches_come_in_parts_too() -> None:
    model = net()
    _, optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(data(), 8), noise_multiplier=0,
        poisson_sampling=False, max_physical_batch_size=3,
    )  # fmt: skip
    assert train(model, optimizer, loader) == [3, 3, 2] * 5
    assert optimizer.steps == 5
    assert optimizer.history == [(0.0, None, 5)]


def test_an_empty_batch_is_a_step_on_noise_alone() -> None:
    """Also for models that cannot reshape no samples."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(9, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.view(x.shape[0], -1))  # type: ignore[no-any-return]

    model = Viewing()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = private(model, noise_multiplier=2.0, expected_batch_size=10)
    out = model(torch.empty(0, 1, 3, 3))
    assert out.shape == (0, 2)
    nn.functional.cross_entropy(out, torch.empty(0, dtype=torch.long)).backward()
    optimizer.step()
    moved = torch.cat([(p - q).detach().flatten() for p, q in zip(model.parameters(), before, strict=True)])
    assert torch.isfinite(moved).all()
    assert 0.05 < moved.std() < 0.6  # 2 / 10
    with pytest.raises(RunError, match="without gradients"):
        optimizer.step()


def test_a_loader_gives_empty_batches_with_shapes_and_types() -> None:
    samples = TensorDataset(torch.zeros(50, 2, 3, dtype=torch.float64), torch.arange(50))
    model = nn.Linear(3, 1)
    loader = make_private(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(samples, 1), noise_multiplier=1, seed=0
    )[2]
    assert loader is not None
    sizes = [
        len(x)
        for x, y in loader
        if x.shape[1:] == (2, 3) and x.dtype == torch.float64 and y.dtype == torch.int64
    ]
    assert len(sizes) == 50
    assert sizes.count(0) > 5
    assert sizes.count(0) + sizes.count(1) < 50


# -- clipping ---------------------------------------------------------------------------------------------------


def summed(clipping: Any, bound: Any, x: Tensor) -> tuple[nn.Module, list[Tensor]]:
    """The model, and the sum that a clipping gives on x."""
    model = net()
    optimizer = private(model, clipping=clipping, max_grad_norm=bound)
    losses(model(x)).mean().backward()
    optimizer.step()
    return model, gradients(model)


def test_automatic_clipping_divides_by_the_norm_and_gamma() -> None:
    x = data(5).tensors[0]
    expected = [torch.zeros_like(p, dtype=torch.float64) for p in net().parameters()]
    for one in sample_gradients(net(), x):
        for total, g in zip(expected, one, strict=True):
            total += 2.0 * g / (length(one) + 0.01)
    assert distance(summed("automatic", 2.0, x)[1], expected) < 1e-6


def test_per_layer_clipping_has_a_bound_for_every_parameter() -> None:
    x = data(5).tensors[0]
    bounds = [0.5, 0.1, 2.0, 0.3]
    for given, used in ((bounds, bounds), (1.0, [0.5] * 4)):
        expected = [torch.zeros_like(p, dtype=torch.float64) for p in net().parameters()]
        for one in sample_gradients(net(), x):
            for total, g, c in zip(expected, one, used, strict=True):
                total += g * min(1.0, c / float(g.norm()))
        assert distance(summed("per_layer", given, x)[1], expected) < 1e-6
    optimizer = private(net(), clipping="per_layer", max_grad_norm=bounds, noise_multiplier=3.0)
    assert optimizer.noise_std == pytest.approx(3 * math.sqrt(sum(c * c for c in bounds)))


def test_the_adaptive_bound_finds_the_quantile_and_pays_for_its_count() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False)
    model.weight.requires_grad_(True)
    x = torch.randn(2000, 4)
    norms = x.norm(dim=1)  # the gradients of Σ w·x
    clipping = Adaptive(max_grad_norm=50.0, target_unclipped_quantile=0.3, unclipped_num_std=20.0)
    optimizer = private(
        model, clipping=clipping, noise_multiplier=1.5, expected_batch_size=2000, loss_reduction="sum"
    )
    for _ in range(60):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
    assert float((norms <= optimizer.max_grad_norm).double().mean()) == pytest.approx(0.3, abs=0.05)
    z = optimizer.noise_std / optimizer.max_grad_norm
    assert z**-2 + (2 * 20.0) ** -2 == pytest.approx(1.5**-2)  # both releases together are the step's
    with pytest.raises(ConfigError, match="unclipped_num_std"):
        private(nn.Linear(1, 1), clipping=Adaptive(unclipped_num_std=0.5), noise_multiplier=1.0)


def test_noise_that_decays_is_in_the_history() -> None:
    assert [TimeDecay(start=2.0, rate=0.5)(t) for t in (0, 2)] == [2.0, 1.0]
    assert [StepDecay(start=2.0, gamma=0.5, step_size=2)(t) for t in range(5)] == [2, 2, 1, 1, 0.5]
    assert ExponentialDecay(start=2.0, rate=math.log(2))(3) == pytest.approx(0.25)
    model = net()
    schedule = StepDecay(start=2.0, gamma=0.5, step_size=2)
    _, optimizer, loader = make_private(
        model, torch.optim.SGD(model.parameters(), 0.1), DataLoader(data(), 8), noise_multiplier=schedule
    )
    stds = []
    optimizer.attach_step_hook(lambda o: stds.append(o.noise_std))
    train(model, optimizer, loader)
    assert optimizer.history == [(2.0, 0.2, 2), (1.0, 0.2, 2), (0.5, 0.2, 1)]
    assert stds == [2, 2, 1, 1, 0.5]


def test_a_hook_that_raises_stops_the_step() -> None:
    """A ledger books before the step; a budget that is spent takes none."""
    model = net()
    before = copy.deepcopy(model.state_dict())
    optimizer = private(model)

    def spent(_: Any) -> None:
        raise RunError("the budget is spent")

    optimizer.attach_step_hook(spent)
    losses(model(data(3).tensors[0])).mean().backward()
    with pytest.raises(RunError, match="spent"):
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# -- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_a_resumed_training_ends_with_the_same_weights(clipping: str) -> None:
    def begin() -> tuple[nn.Module, Any, Any]:
        model = net()
        options: Any = {"noise_multiplier": 1.0, "clipping": clipping, "max_physical_batch_size": 5}
        return make_private(
            model, torch.optim.Adam(model.parameters(), 0.01), DataLoader(data(), 8), **options
        )

    model, optimizer, loader = begin()
    stored = io.BytesIO()
    for number, (x,) in enumerate(_endless(loader)):
        optimizer.zero_grad()
        losses(model(x)).mean().backward()
        optimizer.step()
        if optimizer.steps == 7 and not stored.tell():
            torch.save([model.state_dict(), optimizer.state_dict(), loader.state_dict()], stored)
        if optimizer.steps == 12 or number > 100:
            break
    stored.seek(0)
    weights, state, place = torch.load(stored, weights_only=True)
    other, second, rest = begin()  # by another seed of its own
    other.load_state_dict(weights)
    second.load_state_dict(state)
    rest.load_state_dict(place)
    for (x,) in _endless(rest):
        second.zero_grad()
        losses(other(x)).mean().backward()
        second.step()
        if second.steps == 12:
            break
    assert second.history == optimizer.history == [(1.0, 0.2, 12)]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(RunError, match="secure_mode"):
        private(net(), seed=None, secure_mode=True).load_state_dict(state)
    with pytest.raises(RunError, match="private"):
        second.load_state_dict(torch.optim.Adam(net().parameters()).state_dict())


def _endless(loader: Any) -> Any:
    while True:
        yield from loader


# -- refusals ---------------------------------------------------------------------------------------------------


def test_batch_normalisation_is_named_and_fixed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 48, 1), nn.BatchNorm2d(48), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(ModelError, match=r"1\.weight belongs to a BatchNorm2d.*fix"):
        private(model)
    mended = fix(model)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(mended[1], nn.GroupNorm)  # type: ignore[index]
    assert mended[1].num_groups == 16  # type: ignore[index]
    optimizer = private(mended)
    losses(mended(torch.randn(2, 3, 1, 1).repeat(1, 1, 2, 2)[..., :1, :1])).mean().backward()
    optimizer.step()


def test_what_has_no_per_sample_gradient_is_named() -> None:
    cases: list[tuple[nn.Module, str]] = [
        (
            nn.Sequential(nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
            "0 keeps running statistics",
        ),
        (nn.Sequential(nn.LSTM(3, 2)), r"0\.weight_ih_l0 belongs to a LSTM.*opacus"),
        (nn.Sequential(nn.Embedding(3, 2, max_norm=1.0)), r"0\.weight has no per-sample gradient: max_norm"),
        (nn.Sequential(nn.Embedding(3, 2, scale_grad_by_freq=True)), "scale_grad_by_freq"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)), "parametriz"),
        (nn.ReLU(), "no parameter"),
    ]
    for model, line in cases:
        free = [*model.parameters()] or [nn.Parameter(torch.zeros(1))]
        with pytest.raises(ModelError, match=line):
            make_private(model, torch.optim.SGD(free, 1.0), None, noise_multiplier=1, expected_batch_size=1)


def test_frozen_unused_and_foreign_parameters_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    optimizer = make_private(
        model, torch.optim.SGD(model.parameters(), 1.0), None, noise_multiplier=1, expected_batch_size=4
    )[1]
    frozen = model[0].weight.clone()
    losses(model(torch.randn(4, 3))).mean().backward()
    optimizer.step()
    assert torch.equal(frozen, model[0].weight)
    assert model[0].bias.grad is not None

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    half = Half()
    private(half)
    with pytest.raises(ModelError, match=r"idle\.weight took no part.*freeze"):
        losses(half(torch.randn(3, 2))).mean().backward()
    other = Half()
    some = torch.optim.SGD([*other.used.parameters(), other.idle.weight], 1.0)
    with pytest.raises(ConfigError, match=r"idle\.bias is trainable, but not in the optimizer"):
        make_private(other, some, None, noise_multiplier=1, expected_batch_size=1)
    stranger = nn.Parameter(torch.zeros(7))
    whole = nn.Linear(2, 2)
    foreign = torch.optim.SGD([*whole.parameters(), stranger], 1.0)
    with pytest.raises(ConfigError, match=r"\(7,\) that is not the model's"):
        make_private(whole, foreign, None, noise_multiplier=1, expected_batch_size=1)


def test_a_penalty_on_weights_is_refused_by_name() -> None:
    model = net()
    optimizer = private(model)
    out = losses(model(data(3).tensors[0])).mean() + model[3].weight.square().sum()
    out.backward()
    with pytest.raises(ModelError, match=r"3\.weight got a gradient from outside"):
        optimizer.step()


def test_options_that_make_no_sense_are_refused() -> None:
    for options, line in (
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"clipping": "flta"}, "flat"),
        ({"max_grad_norm": [1.0, 2.0]}, "per_layer"),
        ({"expected_batch_size": 0}, "expected_batch_size"),
        ({"loss_reduction": "none"}, "loss_reduction"),
        ({"engine": "hooks"}, "engine"),
        ({"secure_mode": True}, "seed"),
    ):
        with pytest.raises(ConfigError, match=line):
            private(net(), **options)  # type: ignore[arg-type]
    model = net()
    optimizer = private(model)
    with pytest.raises(ModelError, match="already"):
        make_private(model, optimizer, None, noise_multiplier=1, expected_batch_size=1)
    with pytest.raises(ConfigError, match="LBFGS"):
        make_private(*_lbfgs(), None, noise_multiplier=1, expected_batch_size=1)
    with pytest.raises(ConfigError, match="no further"):
        optimizer.add_param_group({"params": []})


def _lbfgs() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    return model, torch.optim.LBFGS(model.parameters())
