"""The training loop: keyed and exact, stopped by bad losses, and the same bits after `kill -9`."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from robust.augment import Augment
from robust.checkpoint import CHECKPOINT, RECORD, WEIGHTS
from robust.classifier import Classifier
from robust.errors import ConfigError, DataError, RobustError, RunError
from robust.fit import FitResult, Progress, fit, load_samples
from robust.optimise import Average, Settings

ROOT = Path(__file__).resolve().parent.parent.parent


def cross_entropy(clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
    """The plainest loss."""
    return F.cross_entropy(clf(x), y)


def blobs(n: int = 50) -> tuple[Tensor, Tensor]:
    """Two classes of 6x6 images, bright above or bright below."""
    generator = torch.Generator().manual_seed(7)
    y = torch.arange(n) % 2
    x = torch.rand(n, 1, 6, 6, generator=generator) * 0.6
    x[:, :, :3] += 0.4 * (y == 0).float().view(-1, 1, 1, 1)
    x[:, :, 3:] += 0.4 * (y == 1).float().view(-1, 1, 1, 1)
    return x, y


def small() -> nn.Module:
    """A network with everything that has state or draws: batch norm and dropout."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3), nn.Linear(64, 2)
        )


def linear() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 2))


def whole_task(out: Path | None, kill_at: int | None = None, resume: bool = False) -> FitResult:
    """A training that uses every kind of state; it kills itself with SIGKILL after step `kill_at`."""

    def watch(event: Progress) -> None:
        if event.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    return fit(
        small(), blobs(), loss=cross_entropy, epochs=3, batch_size=8, lr=1e-2, optimizer="adamw", warmup=1,
        weight_decay=1e-2, ema=0.9, seed=5, augment=Augment(crop=1, flip=True), valid=blobs(20), out=out,
        resume=resume, checkpoint_seconds=0, progress=watch,
    )  # fmt: skip


def die_while_writing(count: int) -> None:
    """SIGKILL in the middle of the write number `count`: the temporary file is there, but was not renamed."""
    left = [count]

    def replace(self: Path, target: Path) -> Path:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        os.replace(self, target)
        return target

    Path.replace = replace  # type: ignore[method-assign]


def killed(out: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "tests.robust.test_fit", str(out), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=300).returncode
    assert code == -signal.SIGKILL


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def one_thread() -> object:
    before = torch.get_num_threads()
    yield torch.set_num_threads(1)
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_training_killed_twice_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = whole_task(tmp_path / "whole")
    killed(tmp_path / "broken", "9", "step")
    killed(tmp_path / "broken", "4", "write")
    resumed = whole_task(tmp_path / "broken", resume=True)
    assert same(whole.classifier.module.state_dict(), resumed.classifier.module.state_dict())
    assert whole.history == resumed.history
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (tmp_path / "broken" / WEIGHTS).read_bytes()
    again = whole_task(tmp_path / "broken", resume=True)  # a finished training has nothing left to do
    assert same(whole.classifier.module.state_dict(), again.classifier.module.state_dict())


@pytest.mark.usefixtures("one_thread")
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
                  momentum=0.0, weight_decay=0.01, schedule="linear").classifier.module  # fmt: skip
    module = linear()
    weight, bias = module[1].weight.detach().double(), module[1].bias.detach().double()
    flat, onehot = x.flatten(1).double(), F.one_hot(y, 2).double()
    for step in range(4):
        error = (torch.softmax(flat @ weight.T + bias, 1) - onehot) / 50
        rate = 0.3 * (1 - step / 4)
        weight = weight - rate * (error.T @ flat + 0.01 * weight)
        bias = bias - rate * (error.sum(0) + 0.01 * bias)
    torch.testing.assert_close(trained[1].weight.detach().double(), weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trained[1].bias.detach().double(), bias, rtol=1e-5, atol=1e-6)


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
        ("piecewise", [0.5, 1.0, 1.0, 0.1, 0.1, 0.01]),
    ],
)
def test_schedules_in_closed_form(schedule: str, expected: list[float]) -> None:
    settings = Settings(3, lr=1.0, schedule=schedule, warmup=0.5, milestones=(0.5, 0.8))  # type: ignore[arg-type]
    assert [settings.learning_rate(step, 2) for step in range(6)] == pytest.approx(expected)


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
    frozen = module[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = fit(module, blobs(), loss=cross_entropy, epochs=2, channels_last=True)
    assert result.classifier.module is module
    assert not module.training
    assert not module[1].training
    assert torch.equal(frozen, before["0.weight"])
    assert frozen.is_contiguous()
    assert not torch.equal(module[5].weight, before["5.weight"])
    assert not torch.equal(module[1].running_mean, before["1.running_mean"])


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
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused(x: Tensor, y: Tensor, line: str) -> None:
    with pytest.raises(DataError, match=line):
        fit(linear(), (x, y), loss=cross_entropy, epochs=1)


def test_an_augmented_sample_does_not_depend_on_its_batch() -> None:
    x = torch.rand(40, 2, 7, 5)
    index = torch.arange(40) + 100
    whole = Augment(crop=2, flip=True)(x, index, 9)
    assert torch.equal(Augment(crop=2, flip=True)(x[13:14], index[13:14], 9), whole[13:14])
    assert not torch.equal(Augment(crop=2, flip=True)(x, index, 10), whole)


def test_crops_are_all_shifts_and_flips_are_half() -> None:
    point = torch.zeros(2000, 1, 5, 5)
    point[:, :, 2, 2] = 1
    moved = Augment(crop=1)(point, torch.arange(2000), 0)
    places = moved.sum((0, 1))
    assert (places[1:4, 1:4] > 150).all()  # 222 expected in each of nine
    assert places.sum() == places[1:4, 1:4].sum() == 2000
    row = torch.tensor([1.0, 2.0, 3.0]).expand(2000, 1, 1, 3)
    mirrored = (Augment(flip=True)(row, torch.arange(2000), 0)[:, 0, 0, 0] == 3).double().mean()
    assert 0.45 < float(mirrored) < 0.55


# -- run folders --------------------------------------------------------------------------------------------------


def test_the_run_folder_holds_weights_and_their_record(tmp_path: Path) -> None:
    result = fit(
        linear(), blobs(), loss=cross_entropy, epochs=2, out=tmp_path / "a" / "b", record={"why": "test"}
    )
    folder = tmp_path / "a" / "b"
    assert result.out == folder
    assert {path.name for path in folder.iterdir()} == {CHECKPOINT, WEIGHTS, RECORD}
    assert same(load_file(folder / WEIGHTS), result.classifier.module.state_dict())
    record = json.loads((folder / RECORD).read_text())
    assert record == json.loads(json.dumps(result.record))
    assert record["why"] == "test"
    assert record["training"]["seed"] == 0
    assert len(record["history"]) == 2
    assert record["versions"]["torch"] == str(torch.__version__)


def test_another_training_is_not_resumed_and_none_is_overwritten(tmp_path: Path) -> None:
    def train(lr: float, resume: bool, n: int = 50) -> FitResult:
        return fit(linear(), blobs(n), loss=cross_entropy, epochs=1, lr=lr, out=tmp_path, resume=resume)

    train(0.1, resume=True)  # nothing there yet
    with pytest.raises(RunError, match="already holds a training"):
        train(0.1, resume=False)
    with pytest.raises(RunError, match=r"with lr=0\.1, not 0\.2"):
        train(0.2, resume=True)
    with pytest.raises(RunError, match="with data="):
        train(0.1, resume=True, n=40)
    train(0.1, resume=True)


def test_a_damaged_checkpoint_is_one_line(tmp_path: Path) -> None:
    fit(linear(), blobs(), loss=cross_entropy, epochs=1, out=tmp_path)
    content = (tmp_path / CHECKPOINT).read_bytes()
    for damaged in (content[:100], content[: len(content) // 2], b""):
        (tmp_path / CHECKPOINT).write_bytes(damaged)
        with pytest.raises(RunError, match="cannot be resumed from") as caught:
            fit(linear(), blobs(), loss=cross_entropy, epochs=1, out=tmp_path, resume=True)
        assert "\n" not in str(caught.value)


def test_an_out_that_cannot_be_written_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[Progress] = []
    with pytest.raises(RunError, match="cannot be written"):
        fit(
            linear(),
            blobs(),
            loss=cross_entropy,
            epochs=1,
            out=tmp_path / "file" / "run",
            progress=steps.append,
        )
    assert not steps


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
        {"milestones": (0.5, 1.5)},
        {"gamma": 0.0},
        {"ema": 1.0},
    ],
)
def test_settings_that_cannot_be_trained_with_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=rf"^{next(iter(setting))}=.* must be"):
        fit(linear(), blobs(), loss=cross_entropy, **{"epochs": 1, **setting})  # type: ignore[arg-type]


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


if __name__ == "__main__":
    if sys.argv[3] == "write":
        die_while_writing(int(sys.argv[2]))
    whole_task(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[3] == "step" else None, resume=True)
