"""A classifier in training: its arithmetic, its twin that follows the weights, and what the loop adds to it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks import PGD, get
from robust.classifier import Classifier, RobustWarning
from robust.data import load_data
from robust.defenses.training import REGISTRY as recipes
from robust.errors import ConfigError, RunError
from robust.fit import fit
from robust.learner import Arithmetic, Learner
from robust.optimise import Settings
from robust.threat import Linf
from robust.training import HoldOut, TrainConfig, train_model
from tests.robust.training_parts import blobs, cross_entropy, linear, small


def stepped(clf: Learner, x: Tensor, y: Tensor, rate: float = 0.5) -> None:
    """One optimizer step in training mode, which moves weights and running statistics."""
    optimizer = torch.optim.SGD(clf.module.parameters(), rate, momentum=0.9)
    clf.module.train()
    F.cross_entropy(clf(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_twin_follows_every_step(precision: Arithmetic) -> None:
    x, y = blobs()
    clf = Learner(small(), precision)
    first = clf.training_twin(x)
    assert first is not None
    for _ in range(3):
        before = first.logits(x)
        stepped(clf, x, y)
        assert clf.training_twin(x) is first
        tolerance = 1e-5 if precision == "float32" else 3e-2
        expected = clf.logits(x)
        torch.testing.assert_close(first.logits(x), expected, rtol=tolerance, atol=tolerance)
        assert float((before - expected).abs().max()) > tolerance, "the step was too small to tell"


def test_a_compiled_twin_follows_too() -> None:
    x, y = blobs(128)
    clf = Learner(small(), "float32", compiled=True)
    attack = PGD(threat=Linf(0.1), steps=3)
    index = torch.arange(128)
    with clf.session():
        attack.points(clf, x, y, seed=1, index=index)
    stepped(clf, x, y)
    with clf.session():
        found = attack.points(clf, x, y, seed=1, index=index)
    twin = clf.twins["training"][1]
    assert any(program is not None for program in twin.programs.values())
    plain = Learner(small())
    plain.module.load_state_dict(clf.module.state_dict())
    with plain.session():
        expected = attack.points(plain, x, y, seed=1, index=index)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_points_are_where_the_last_step_of_an_independent_pgd_leads() -> None:
    x, y = blobs()
    clf = Learner(small())
    attack = PGD(threat=Linf(0.1), steps=5, step_size=0.04, random_start=False)
    with clf.session():
        found = attack.points(clf, x, y, seed=3, index=torch.arange(len(x)))
    plain, points = small().eval(), x.clone()
    for _ in range(5):
        points.requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(plain(points), y, reduction="sum"), points)
        points = (points.detach() + 0.04 * gradient.sign()).clamp(x - 0.1, x + 0.1).clamp(0, 1)
    torch.testing.assert_close(found, points, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "forwards"), [("pgd", 5), ("tpgd", 6)])
def test_points_cost_a_gradient_a_step_and_nothing_to_look_at_them(name: str, forwards: int) -> None:
    x, y = blobs(16)
    clf = Learner(small())
    attack = get(name)(threat=Linf(0.1), steps=5)
    with clf.session():
        attack.points(clf, x, y, seed=0, index=torch.arange(16))  # makes the twin
        before = clf.cost.forwards, clf.cost.backwards
        attack.points(clf, x, y, seed=0, index=torch.arange(16))
    assert clf.cost.forwards - before[0] == forwards * 16, (
        "TRADES' search needs the clean points' logits, too"
    )
    assert clf.cost.backwards - before[1] == 5 * 16


def test_a_model_that_cannot_be_copied_is_asked_itself() -> None:
    class Locked(nn.Sequential):
        def __deepcopy__(self, memo: object) -> Locked:
            raise TypeError("locked")

    x, y = blobs()
    clf = Learner(Locked(nn.Flatten(), nn.Linear(36, 2)))
    with pytest.warns(RobustWarning, match=r"no twin speeds the inner attacks up \(.*locked"), clf.session():
        points = PGD(threat=Linf(0.1), steps=3).points(clf, x, y, seed=0, index=torch.arange(len(x)))
    assert float((points - x).abs().max()) == pytest.approx(0.1, abs=1e-6)


def test_bfloat16_computes_in_bfloat16_and_learns_in_float32() -> None:
    seen: list[torch.dtype] = []
    module = linear()
    module[1].register_forward_hook(lambda m, args, out: seen.append(out.dtype) if m.training else None)
    result = fit(module, blobs(), loss=cross_entropy, epochs=12, lr=0.05, precision="bfloat16")
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_parts_of_a_batch_add_up_to_its_gradient() -> None:
    whole, parts = (
        fit(
            linear(),
            blobs(),
            loss=cross_entropy,
            epochs=2,
            batch_size=25,
            optimizer="sgd",
            lr=0.5,
            accumulate=n,
        )
        for n in (1, 3)
    )
    for one, other in zip(
        whole.classifier.module.parameters(), parts.classifier.module.parameters(), strict=True
    ):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert parts.history[-1]["loss"] == pytest.approx(whole.history[-1]["loss"], rel=1e-5)


def test_the_best_epoch_is_kept_and_said() -> None:
    scores = iter([0.1, 0.7, 0.7, 0.2])
    states: list[dict[str, Tensor]] = []

    def valid(clf: Classifier) -> dict[str, float]:
        states.append({name: value.clone() for name, value in clf.module.state_dict().items()})
        return {"score": next(scores)}

    module = small()
    result = fit(module, blobs(), loss=cross_entropy, epochs=4, valid=valid, keep="score", ema=0.5)
    assert result.record["kept_epoch"] == 2, "the first of equals"
    for name, value in module.state_dict().items():
        assert torch.equal(value, states[1][name])
    assert not torch.equal(states[1]["0.weight"], states[3]["0.weight"])


def test_a_number_that_is_not_measured_cannot_decide() -> None:
    with pytest.raises(ConfigError, match=r"keep=score is not measured; an epoch has epoch, loss, lr"):
        fit(linear(), blobs(), loss=cross_entropy, epochs=1, keep="score")


def test_tensorboard_has_every_epoch_once_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Stop(Exception):
        pass

    def stop(event: object) -> None:
        if getattr(event, "step", 0) == 5:
            raise Stop

    def train(resume: bool) -> list[dict[str, float]]:
        return fit(
            linear(), blobs(), loss=cross_entropy, epochs=4, batch_size=25, valid=blobs(20), out=tmp_path,
            checkpoint_seconds=0, tensorboard=True, resume=resume, progress=None if resume else stop,
        ).history  # fmt: skip

    with pytest.raises(Stop):
        train(False)
    history = train(True)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    values = [event.value for event in board.Scalars("valid_accuracy")]
    assert values == pytest.approx([entry["valid_accuracy"] for entry in history])


def test_tensorboard_without_a_folder_is_one_line() -> None:
    with pytest.raises(RunError, match="give out"):
        fit(linear(), blobs(), loss=cross_entropy, epochs=1, tensorboard=True)


def test_held_out_samples_are_not_trained_on(tmp_path: Path) -> None:
    x, y = load_data("digits", train=True).tensors()
    held = HoldOut(n=100, eps=0.1, steps=2)
    (a, b), (c, d) = held.split(x, y, 3)
    assert (len(a), len(b), len(c), len(d)) == (len(x) - 100, len(x) - 100, 100, 100)
    rows = {tuple(row.tolist()) for row in a.flatten(1)}
    assert sum(tuple(row.tolist()) in rows for row in c.flatten(1)) <= 1, "digits has hardly a double"
    config = TrainConfig(fit=Settings(epochs=2, batch_size=256), hold_out=held)
    result, _ = train_model(config, tmp_path)
    assert result.record["training"]["data"].startswith(f"({len(x) - 100}, ")
    assert all({"valid_accuracy", "valid_robust_accuracy"} <= entry.keys() for entry in result.history)
    best = max(result.history, key=lambda entry: entry["valid_robust_accuracy"])
    assert result.record["kept_epoch"] == best["epoch"]
    with pytest.raises(ConfigError, match="n="):
        replace(held, n=len(x)).split(x, y, 3)


@pytest.mark.parametrize(
    ("fields", "line"),
    [({"precision": "float16"}, "float32 or bfloat16"), ({"accumulate": 0}, "1 to the batch size")],
)
def test_what_cannot_be_trained_with_is_one_line(fields: dict[str, object], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        Settings(epochs=1, **fields)  # type: ignore[arg-type]


def test_a_setting_that_does_not_exist_is_one_line_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="weight_decay"):
        fit(linear(), blobs(), loss=cross_entropy, epochs=1, weight_decy=0.1)
    with pytest.raises(ConfigError, match="epochs is missing"):
        fit(linear(), blobs(), loss=cross_entropy)


def test_a_loss_of_a_gradient_is_not_compiled() -> None:
    recipe = recipes.load("fast")(eps=0.1, alignment=0.2)
    with pytest.raises(ConfigError, match="compiled=true cannot be trained with: Fast"):
        fit(linear(), blobs(), loss=recipe, epochs=1, compiled=True)
