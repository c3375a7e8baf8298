"""Stacked training: every model ends where it would alone, on either engine, in any company, after any interruption."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust import Classifier
from robust.augment import Augment
from robust.errors import ConfigError, DataError, ModelError, RobustError, RunError
from robust.stacked import first_states, fit_stacked

WALK: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 8,
    "lr": 0.05,
    "optimizer": "sgd",
    "weight_decay": 1e-3,
    "seed": 5,
}


def net(*, norm: bool = False, dropout: float = 0.0) -> nn.Module:
    """A small ConvNet for 6x6 images and three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, padding=1)]
        layers += [nn.BatchNorm2d(4)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        layers += [nn.Dropout(dropout)] if dropout else []
        return nn.Sequential(*layers, nn.Linear(36, 3))


def fresh() -> nn.Module:
    """The same with weights from torch's global generator."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


def samples(n: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (n, 1, 6, 6), generator=generator, dtype=torch.uint8)
    return x, torch.randint(0, 3, (n,), generator=generator)


def parts(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randperm(60, generator=generator)[:size] for size in sizes]


def furthest(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference between two states."""
    assert set(a) == set(b)
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


def by_hand(rows: Tensor, key: int, walk: Mapping[str, Any]) -> dict[str, Tensor]:
    """Plain SGD on whole batches with nothing of the engines but their keyed order: an independent loop."""
    from robust.optimise import make_settings
    from robust.stacked_engines import Stream

    x, y = samples()
    module, settings = net().train(), make_settings(walk)
    stream = Stream(settings, rows, key, None)
    momenta = [torch.zeros_like(p) for p in module.parameters()]
    for step in range(stream.steps):
        batch = stream.batch(step)
        loss = nn.functional.cross_entropy(module(x[batch].float() / 255), y[batch])
        gradients = torch.autograd.grad(loss, list(module.parameters()))
        with torch.no_grad():
            for p, gradient, momentum in zip(module.parameters(), gradients, momenta, strict=True):
                slope = gradient + settings.weight_decay * p
                momentum.mul_(settings.momentum).add_(slope)
                p -= settings.learning_rate(step, stream.per_epoch) * (slope + settings.momentum * momentum)
    return dict(module.state_dict())


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_each_model_ends_where_plain_sgd_alone_ends(engine: Any) -> None:
    rows = parts(24, 17, 5)  # whole batches, one sample too many, less than a batch
    found = fit_stacked(net(), samples(), rows, engine=engine, **WALK)
    for key, part in enumerate(rows):
        assert furthest(found.states[key], by_hand(part, key, WALK)) < 2e-6
    assert [len(losses) for losses in found.losses] == [2, 2, 2]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_engines_agree_on_ragged_data_augmentation_and_steps(optimizer: str, schedule: str) -> None:
    walk = WALK | {"optimizer": optimizer, "schedule": schedule, "lr": 0.01, "warmup": 0.5}
    rows, steps = parts(30, 11, 8, 16), [7, 2, 5, 1]
    given: dict[str, Any] = {"augment": Augment(crop=1, flip=True), "steps": steps, **walk}
    stacked = fit_stacked(net(), samples(), rows, engine="vmap", **given)
    looped = fit_stacked(net(), samples(), rows, engine="loop", **given)
    for k in range(4):
        assert furthest(stacked.states[k], looped.states[k]) < 5e-6
        assert stacked.losses[k] == pytest.approx(looped.losses[k], rel=1e-4)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_a_model_does_not_depend_on_its_company_or_the_chunks(engine: Any) -> None:
    rows = parts(24, 17, 30)
    first = first_states(fresh, 0)
    all_three = fit_stacked(net(), samples(), rows, engine=engine, first=first, **WALK)
    by_two = fit_stacked(net(), samples(), rows, engine=engine, first=first, chunk=2, **WALK)
    alone = fit_stacked(net(), samples(), rows[2:], engine=engine, first=first, keys=[2], **WALK)
    for k in range(3):
        assert furthest(all_three.states[k], by_two.states[k]) < 2e-6
    assert furthest(all_three.states[2], alone.states[0]) < 2e-6


def test_several_threads_train_the_same_bits_as_one() -> None:
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            rows, first = parts(24, 17, 30, 9, 24, 17), first_states(fresh, 0)
            found.append(fit_stacked(net(), samples(), rows, engine="loop", first=first, **WALK))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert max(furthest(a, b) for a, b in zip(found[0].states, found[1].states, strict=True)) == 0
    assert furthest(found[0].states[0], found[0].states[4]) > 1e-3


def test_batch_normalisation_keeps_statistics_of_each_model() -> None:
    rows = parts(24, 24, 24)
    stacked = fit_stacked(net(norm=True), samples(), rows, engine="vmap", **WALK)
    looped = fit_stacked(net(norm=True), samples(), rows, engine="loop", **WALK)
    for k in range(3):
        assert furthest(stacked.states[k], looped.states[k]) < 5e-6
        assert int(stacked.states[k]["1.num_batches_tracked"]) == 6
    assert furthest(stacked.states[0], stacked.states[1]) > 1e-3
    steps = [6, 2, 4]  # a model that has ended keeps its statistics
    stacked = fit_stacked(net(norm=True), samples(), rows, engine="vmap", steps=steps, **WALK)
    looped = fit_stacked(net(norm=True), samples(), rows, engine="loop", steps=steps, **WALK)
    assert max(furthest(a, b) for a, b in zip(stacked.states, looped.states, strict=True)) < 5e-6


def test_what_cannot_be_stacked_is_refused_by_name_and_looped_by_itself() -> None:
    for module, rows, reason in (
        (net(norm=True), parts(24, 17), "batch normalisation"),
        (net(dropout=0.5), parts(24, 24), "random numbers"),
    ):
        with pytest.raises(ModelError, match=reason):
            fit_stacked(module, samples(), rows, engine="vmap", **WALK)
        assert fit_stacked(module, samples(), rows, **WALK).engine == "loop"


def test_dropout_is_keyed_by_model_and_step() -> None:
    rows = parts(24, 17)
    both = fit_stacked(net(dropout=0.5), samples(), rows, **WALK)
    torch.rand(7)
    alone = fit_stacked(net(dropout=0.5), samples(), rows[1:], keys=[1], **WALK)
    assert furthest(both.states[1], alone.states[0]) == 0


def test_perceptrons_are_stacked_and_convolutions_looped_on_a_cpu() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))
    assert fit_stacked(flat, samples(), parts(9, 8), **WALK).engine == "vmap"
    assert fit_stacked(net(), samples(), parts(9, 8), **WALK).engine == "loop"


class Stop(Exception):
    """What ends a training in the middle, as a kill would."""


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_a_killed_training_goes_on_with_the_same_bits_and_trains_nothing_twice(
    engine: Any, tmp_path: Path
) -> None:
    rows, options = parts(24, 17, 30, 9), {"engine": engine, "chunk": 2, "checkpoint_seconds": 0.0, **WALK}
    whole = fit_stacked(net(), samples(), rows, **options)
    seen: list[float] = []

    def kill(done: float, text: str) -> None:
        seen.append(done)
        if len(seen) in (4, 9):
            raise Stop

    for _ in range(2):
        with pytest.raises(Stop):
            fit_stacked(net(), samples(), rows, out=tmp_path / "run", resume=True, progress=kill, **options)
    resumed = fit_stacked(net(), samples(), rows, out=tmp_path / "run", resume=True, progress=kill, **options)
    assert max(furthest(a, b) for a, b in zip(whole.states, resumed.states, strict=True)) == 0
    assert resumed.losses == whole.losses
    assert not list((tmp_path / "run").glob("checkpoint*"))
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("model-*")}
    more = fit_stacked(net(), samples(), [*rows, parts(12)[0]], out=tmp_path / "run", resume=True, **options)
    assert len(more) == 5
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_another_training_s_folder_is_refused(tmp_path: Path) -> None:
    rows = parts(9, 8)
    fit_stacked(net(), samples(), rows, out=tmp_path / "a", **WALK)
    with pytest.raises(RunError, match="already holds models"):
        fit_stacked(net(), samples(), rows, out=tmp_path / "a", **WALK)
    with pytest.raises(RunError, match=r"lr=0\.05, not 0\.1"):
        fit_stacked(net(), samples(), rows, out=tmp_path / "a", resume=True, **WALK | {"lr": 0.1})
    with pytest.raises(RunError, match="other rows"):
        fit_stacked(net(), samples(), rows[::-1], out=tmp_path / "a", resume=True, **WALK)


def test_classifiers_share_box_and_normalisation_and_learn() -> None:
    x, _ = samples()
    bright = (x.float().mean((1, 2, 3)) / 43).long().clamp(0, 2)
    template = Classifier(net(), mean=0.5, std=0.25)
    found = fit_stacked(template, (x, bright), parts(60, 60), **WALK | {"epochs": 8})
    clf = found.classifier(1)
    assert clf.std.item() == 0.25
    assert not clf.module.training
    assert found.losses[1][-1] < found.losses[1][0]
    assert found.stacked()["0.weight"].shape == (2, 4, 1, 3, 3)
    assert furthest(template.module.state_dict(), net().state_dict()) == 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"ema": 0.9}, "ema=0.9 is for robust.fit"),
        ({"engine": "warp"}, "engine='warp' is unknown"),
        ({"chunk": 0}, "chunk=0 stacks no model"),
        ({"steps": [1]}, "steps has 1 entries for 2 models"),
        ({"steps": [1, 0]}, "every model takes at least 1"),
        ({"keys": [1, 1]}, "keys must differ"),
        ({"rows": []}, "rows is empty"),
        ({"rows": [torch.tensor([60])]}, "model 0 has the row 60 of 60 samples"),
        ({"rows": [torch.zeros(0, dtype=torch.int64)]}, "the rows of model 0 are"),
        ({"lr": 1e30}, "became NaN or infinite; lower the learning rate"),
        ({"model": nn.Linear(5, 3)}, "Linear fails on inputs of shape"),
        (
            {"model": nn.Sequential(nn.Flatten(), nn.Linear(36, 2))},
            "a label is 2, but Sequential has 2 classes",
        ),
        ({"epoch": 3}, "unknown setting 'epoch'; did you mean epochs"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], line: str) -> None:
    given: dict[str, Any] = {"rows": parts(9, 8), **WALK} | change
    with pytest.raises(RobustError, match=line) as caught:
        fit_stacked(given.pop("model", net()), samples(), given.pop("rows"), **given)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, (ConfigError, DataError, ModelError, RunError))
