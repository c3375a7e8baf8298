"""The training loop: keyed and exact, its schedules and averages, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.checkpoint import WEIGHTS
from robust.classifier import Classifier
from robust.errors import ConfigError, DataError, ModelError, RobustError, RunError
from robust.fit import fit
from robust.optimise import Average, Settings
from robust.samples import load_samples
from robust.trainer import Progress
from tests.robust.training_parts import blobs, cross_entropy, linear, same, small, whole_task


def test_a_training_is_a_function_of_its_seed() -> None:
    first, second = whole_task(None), whole_task(None)
    assert same(first.classifier.module.state_dict(), second.classifier.module.state_dict())
    other = fit(small(), blobs(), loss=cross_entropy, epochs=1, batch_size=8, seed=1).classifier.module
    third = fit(small(), blobs(), loss=cross_entropy, epochs=1, batch_size=8, seed=2).classifier.module
    assert not same(other.state_dict(), third.state_dict())


def test_the_callers_random_state_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    fit(small(), blobs(), loss=cross_entropy, epochs=1)
    assert torch.equal(before, torch.random.get_rng_state())


def test_plain_sgd_equals_an_independent_loop() -> None:
    x, y = blobs()
    trained = fit(linear(), (x, y), loss=cross_entropy, epochs=4, batch_size=50, lr=0.3, optimizer="sgd",
                  momentum=0.0, weight_decay=0.01, schedule="linear").classifier.module.state_dict()  # fmt: skip
    weight, bias = (value.double() for value in linear().state_dict().values())
    flat, onehot = x.flatten(1).double(), F.one_hot(y, 2).double()
    for step in range(4):
        error = (torch.softmax(flat @ weight.T + bias, 1) - onehot) / 50
        rate = 0.3 * (1 - step / 4)
        weight = weight - rate * (error.T @ flat + 0.01 * weight)
        bias = bias - rate * (error.sum(0) + 0.01 * bias)
    torch.testing.assert_close(trained["1.weight"].double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained["1.bias"].double(), bias, rtol=1e-5, atol=1e-6)


def test_every_epoch_sees_every_sample_once_in_a_new_keyed_order() -> None:
    x, y = blobs()
    seen: list[list[int]] = [[], [], []]
    seeds: list[int] = []

    def spy(clf: Classifier, inputs: Tensor, labels: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        assert torch.equal(inputs, x[index])
        assert torch.equal(labels, y[index])
        seeds.extend([epoch_seed] * (epoch_seed not in seeds))
        seen[len(seeds) - 1].extend(index.tolist())
        return F.cross_entropy(clf(inputs), labels)

    fit(linear(), (x, y), loss=spy, epochs=3, batch_size=16)
    assert [sorted(order) for order in seen] == [list(range(50))] * 3
    assert seen[0] != seen[1] != seen[2]
    assert len(seeds) == 3
    first = seen[0]
    seen[:], seeds[:] = [[], [], []], []
    fit(linear(), (x, y), loss=spy, epochs=2, batch_size=10)
    assert seen[0] == first


def test_a_last_batch_of_one_joins_the_one_before() -> None:
    sizes: list[int] = []

    def spy(clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        sizes.append(len(x))
        return F.cross_entropy(clf(x), y)

    fit(small(), blobs(17), loss=spy, epochs=1, batch_size=8)
    assert sizes == [8, 9]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_training_with_one_line(value: float, tmp_path: Path) -> None:
    steps: list[int] = []

    def bad(clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        steps.append(1)
        return F.cross_entropy(clf(x), y) * (value if len(steps) == 6 else 1)

    module = linear()
    with pytest.raises(
        RunError, match=r"loss became (nan|inf) in epoch 2, step 6; lower .*lr=0\.5"
    ) as caught:
        fit(module, blobs(), loss=bad, epochs=3, batch_size=13, lr=0.5, out=tmp_path)
    assert "\n" not in str(caught.value)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert not (tmp_path / WEIGHTS).exists()


def test_a_diverging_training_stops() -> None:
    with pytest.raises(RunError, match="loss became"):
        fit(small(), blobs(), loss=lambda clf, x, y, index, seed: -cross_entropy(clf, x, y, index, seed),
            epochs=2000, lr=1e9, optimizer="sgd", schedule="constant")  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.8, 0.6, 0.4, 0.2]),
        ("cosine", [0.5, *(0.5 * (1 + math.cos(math.pi * k / 5)) for k in range(5))]),
        ("piecewise", [0.5, 1.0, 1.0, 1.0, 0.1, 0.01]),
    ],
)
def test_schedules_in_closed_form(schedule: str, expected: list[float]) -> None:
    settings = Settings(3, lr=1.0, schedule=schedule, warmup=0.5, milestones=(0.5, 0.8))  # type: ignore[arg-type]
    assert [settings.learning_rate(step, 2) for step in range(6)] == pytest.approx(expected)


def test_a_schedule_restarts_in_every_cycle() -> None:
    once, twice = Settings(3, lr=1.0, warmup=1), Settings(5, lr=1.0, warmup=1, cycles=2)
    rates = [once.learning_rate(step, 10) for step in range(30)]
    assert [twice.learning_rate(step, 10) for step in range(50)] == rates + rates[10:]


def test_the_model_ends_with_the_averaged_weights() -> None:
    x, y = blobs()
    module = linear()
    average = {name: value.clone() for name, value in module.state_dict().items()}

    def follow(event: Progress) -> None:
        decay = min(0.6, event.step / (9 + event.step))
        for name, value in module.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value

    result = fit(
        module, (x, y), loss=cross_entropy, epochs=3, batch_size=10, lr=0.1, ema=0.6, progress=follow
    )
    for name, value in result.classifier.module.state_dict().items():
        torch.testing.assert_close(value, average[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_only_borrowed_for_measurements() -> None:
    module = small()
    own = {name: value.clone() for name, value in module.state_dict().items()}
    average = Average(module, 0.9)
    average.state["5.bias"] += 1
    with average.applied(module):
        assert torch.equal(module.state_dict()["5.bias"], own["5.bias"] + 1)
    assert same(module.state_dict(), own)


def test_the_module_is_trained_in_place_and_left_in_the_mode_it_was_found_in() -> None:
    module = small().eval()
    frozen = next(module.parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = fit(module, blobs(), loss=cross_entropy, epochs=2, channels_last=True)
    assert result.classifier.module is module
    assert not module.training
    assert not module[1].training
    assert torch.equal(frozen, before["0.weight"])
    assert frozen.is_contiguous()
    after = module.state_dict()
    assert not torch.equal(after["5.weight"], before["5.weight"])
    assert not torch.equal(after["1.running_mean"], before["1.running_mean"])


def test_a_classifiers_normalisation_is_trained_with() -> None:
    shown: list[Tensor] = []

    class Spy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(36, 2)

        def forward(self, x: Tensor) -> Tensor:
            shown.append(x.detach())
            logits: Tensor = self.linear(x.flatten(1))
            return logits

    x, y = blobs(4)
    fit(Classifier(Spy(), mean=0.25, std=0.5), (x, y), loss=cross_entropy, epochs=1)
    torch.testing.assert_close(shown[0].sort(0).values, ((x - 0.25) / 0.5).sort(0).values)


def test_history_holds_the_mean_loss_and_what_validation_measured() -> None:
    x, y = blobs()
    result = fit(linear(), (x, y), loss=lambda clf, x, y, index, seed: index.double().mean() + 0 * clf(x).sum(),
                 epochs=2, batch_size=16, valid=(x, y))  # fmt: skip
    accuracy = float((result.classifier.logits(x).argmax(1) == y).double().mean())
    assert result.history[1] == pytest.approx(
        {"epoch": 2, "loss": 24.5, "lr": result.history[1]["lr"], "valid_accuracy": accuracy}
    )
    asked = fit(
        linear(), (x, y), loss=cross_entropy, epochs=1, valid=lambda clf: {"modes": clf.module.training}
    )
    assert "modes" in asked.history[0]


def test_training_works() -> None:
    x, y = blobs(200)
    result = fit(small(), (x, y), loss=cross_entropy, epochs=8, batch_size=20, lr=1e-2, valid=(x, y))
    assert result.history[-1]["valid_accuracy"] > 0.95


# -- data ---------------------------------------------------------------------------------------------------------


def test_images_of_bytes_are_kept_as_bytes_and_nothing_else_is() -> None:
    bytes_ = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
    x, _ = load_samples((bytes_.float() / 255, torch.zeros(3, dtype=torch.int64)))
    assert x.dtype == torch.uint8
    assert torch.equal(x, bytes_)
    x, _ = load_samples((bytes_.float() / 16, torch.zeros(3, dtype=torch.int64)))
    assert x.dtype == torch.float32


def test_bytes_and_floats_train_alike() -> None:
    bytes_ = torch.randint(
        0, 256, (30, 1, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    y = torch.arange(30) % 2
    first = fit(linear(), (bytes_, y), loss=cross_entropy, epochs=2, batch_size=7).classifier.module
    second = fit(
        linear(), (bytes_.float() / 255, y), loss=cross_entropy, epochs=2, batch_size=7
    ).classifier.module
    assert same(first.state_dict(), second.state_dict())


@pytest.mark.parametrize(
    ("x", "y", "line"),
    [
        (torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.int64), "0 inputs and 0 labels"),
        (torch.zeros(3, 1, 6, 6), torch.zeros(2, dtype=torch.int64), "3 inputs and 2 labels"),
        (torch.zeros(3, 1, 6, 6), torch.zeros(3), "labels are torch.float32"),
        (torch.zeros(3, 1, 6, 6), torch.tensor([0, -1, 1]), "class numbers"),
        (torch.zeros(2, 1, 6, 6), torch.tensor([0, 2]), "a label is 2, but Sequential has 2 classes"),
        (torch.full((2, 1, 6, 6), 2.0), torch.tensor([0, 1]), "outside the box"),
        (torch.full((2, 1, 6, 6), math.nan), torch.tensor([0, 1]), "remove the NaN"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused(x: Tensor, y: Tensor, line: str) -> None:
    with pytest.raises(DataError, match=line):
        fit(linear(), (x, y), loss=cross_entropy, epochs=1)


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"optimizer": "lion"},
        {"schedule": "up"},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"warmup": -1.0},
        {"cycles": 2},
        {"milestones": (0.5, 1.5)},
        {"gamma": 0.0},
        {"ema": 1.0},
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(setting))}=.* must be"):
        fit(linear(), blobs(), loss=cross_entropy, **{"epochs": 1, **setting})  # type: ignore[arg-type]


def test_a_model_that_cannot_take_the_inputs_is_refused() -> None:
    with pytest.raises(ModelError, match=r"Sequential fails on inputs of shape \(16, 1, 5, 5\)"):
        fit(linear(), (torch.zeros(20, 1, 5, 5), torch.arange(20) % 2), loss=cross_entropy, epochs=1)


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(RobustError, match="nothing to train"):
        fit(nn.Flatten(), blobs(), loss=cross_entropy, epochs=1)


def test_progress_tells_the_time_left() -> None:
    events: list[Progress] = []
    fit(linear(), blobs(), loss=cross_entropy, epochs=2, batch_size=25, progress=events.append)
    assert [(event.epoch, event.step, event.steps) for event in events] == [
        (1, 1, 4),
        (1, 2, 4),
        (2, 3, 4),
        (2, 4, 4),
    ]
    assert events[-1].seconds_left == 0
    assert events[1].seconds_left == pytest.approx(events[1].seconds)
