"""What holds for every recipe in the registry; a new row is tested here without a new file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust.cli.main import run
from robust.data import load_data
from robust.defenses.training import REGISTRY, get
from robust.defenses.training.adversarial import AdversarialRecipe
from robust.fit import fit
from robust.learner import Learner
from robust.recipe import Recipe
from robust.registry import card
from tests.contracts.recipe_subjects import digits, fields, learner, make, network, train
from tests.robust.training_parts import same

NAMES = sorted(REGISTRY)
EVERY = pytest.mark.parametrize("name", NAMES)
ADVERSARIAL = [name for name in NAMES if issubclass(get(name), AdversarialRecipe)]
DRAWING = {"gaussian", "mixup", "fast", "ensemble-at", "pgd-at", "trades", "mart", "awp"}
WHOLE_BATCH = {"mixup", "awp"}  # pairs, and one perturbation of the weights


def gradients(clf: Learner, recipe: Recipe, rows: slice, seed: int = 3) -> tuple[float, list[Tensor]]:
    """The loss of some digits and its weight gradients; their identities are not their positions."""
    x, y = digits()
    clf.module.zero_grad(set_to_none=True)
    loss = recipe.loss(clf, x[rows], y[rows], torch.arange(len(x))[rows] + 50, seed)
    assert loss.shape == ()
    loss.backward()
    found = [parameter.grad for parameter in clf.module.parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in found)
    return float(loss.detach()), [g.clone() for g in found if g is not None]


@EVERY
def test_a_recipe_names_paper_and_cost(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert issubclass(get(name), Recipe)
    assert any(c.isdigit() for c in card(get(name)))
    assert run(["list", "recipes", "--json"]) == 0
    [row] = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["name"] == name]
    assert any(c.isdigit() for c in row["paper"])
    assert row["gradients"] == get(name).gradients() >= 1


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ensemble-at"])
def test_the_stated_cost_is_what_a_step_takes(name: str) -> None:
    """Backward passes, counted; one more is what the engine's TPGD asks at the clean points."""
    passes: list[int] = []
    clf = learner()
    clf.module[-1].register_full_backward_hook(lambda *_: passes.append(1))
    gradients(
        clf, make(name), slice(0, 4)
    )  # the first step makes the twin of the inner attack, and checks it
    passes.clear()
    gradients(clf, make(name), slice(0, 4))
    options = {key: value for key, value in fields(name).items() if key == "steps"}
    assert len(passes) == get(name).gradients(**options)


@EVERY
def test_a_recipe_trains(name: str) -> None:
    result = fit(network(), digits(), loss=make(name), epochs=5, batch_size=30, lr=1e-2)
    x, y = load_data("digits", n=200).tensors()
    assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
    assert float((result.classifier.logits(x).argmax(1) == y).double().mean()) > 0.7
    assert result.record["warnings"] == []


@EVERY
def test_a_training_is_a_function_of_its_seed(name: str) -> None:
    first, again, other = (
        train(name, epochs=1, seed=seed).classifier.module.state_dict() for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert not same(first, other)


@EVERY
def test_draws_differ_between_epochs(name: str) -> None:
    clf = learner(norm=False)
    first, second = (gradients(clf, make(name), slice(0, 12), seed)[0] for seed in (3, 4))
    assert (first != second) == (name in DRAWING)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WHOLE_BATCH])
def test_draws_belong_to_the_sample_and_not_to_its_batch(name: str) -> None:
    clf, recipe = learner(norm=False), make(name)
    whole, together = gradients(clf, recipe, slice(0, 12))
    first, upper = gradients(clf, recipe, slice(0, 5))
    second, lower = gradients(clf, recipe, slice(5, 12))
    assert whole == pytest.approx((5 * first + 7 * second) / 12, rel=1e-4)
    for a, b, c in zip(together, upper, lower, strict=True):
        torch.testing.assert_close(a, (5 * b + 7 * c) / 12, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in ADVERSARIAL if name not in ("free", "fgsm-at")])
def test_random_starts_differ_between_samples_and_epochs(name: str) -> None:
    clf = learner(norm=False)
    recipe = make(name, **({"steps": 1, "step_size": 0.02} if "steps" in fields(name) else {}))
    assert isinstance(recipe, AdversarialRecipe)
    x, y, index = torch.full((9, 1, 8, 8), 0.5), torch.zeros(9, dtype=torch.int64), torch.arange(9)
    first, second = (recipe.adversarial(clf, x, y, index, seed) for seed in (1, 2))
    part = recipe.adversarial(clf, x[6:], y[6:], index[6:], 1)
    torch.testing.assert_close(part, first[6:], rtol=0, atol=1e-6)
    far = 1e-3  # TRADES' start is N(0, 0.001²) from the clean point
    if name == "ensemble-at":  # only the source is drawn
        assert float((first - first[:1]).abs().max()) > far
        assert float((first - second).abs().max()) > far
        return
    assert bool(((first - second).flatten(1).abs().amax(1) > far).all())
    assert bool(((first[1:] - first[:1]).flatten(1).abs().amax(1) > far).all())


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_points_to_train_on_stay_in_ball_and_box(name: str) -> None:
    recipe = make(name, eps=0.3)
    assert isinstance(recipe, AdversarialRecipe)
    x, y = (part[:12] for part in digits())
    points = recipe.adversarial(learner(), x, y, torch.arange(12), 0)
    assert bool(recipe.threat.inside(points, x, (0.0, 1.0)).all())
    assert float((points - x).abs().amax()) == pytest.approx(0.3, rel=0.01)


@EVERY
def test_a_loss_moves_no_weight_and_only_outer_forwards_teach_batch_norm(name: str) -> None:
    clf = learner()
    before = {key: value.clone() for key, value in clf.module.state_dict().items()}
    buffers = dict(clf.module.named_buffers())
    gradients(clf, make(name), slice(0, 12))
    assert all(torch.equal(before[key], value) for key, value in clf.module.named_parameters())
    assert all(value is buffers[key] for key, value in clf.module.named_buffers())
    outer = 2 if name in ("trades", "mart", "fgsm-at", "ensemble-at") else 1
    assert int(clf.module.state_dict()["1.num_batches_tracked"]) == outer
    assert clf.module.training
    assert all(p.requires_grad for p in clf.module.parameters())


class Stopped(Exception):
    """An interruption."""


@EVERY
def test_a_training_that_was_interrupted_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    def stop(event: object) -> None:
        if getattr(event, "step", 0) == 5:
            raise Stopped

    whole = train(name)
    with pytest.raises(Stopped):
        train(name, tmp_path, progress=stop)
    resumed = train(name, tmp_path, resume=True)
    assert same(whole.classifier.module.state_dict(), resumed.classifier.module.state_dict())
    assert whole.history == resumed.history


@EVERY
def test_the_command_line_trains_with_it(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    x, y = digits()
    np.savez(tmp_path / "tiny.npz", x=x[:40].numpy(), y=y[:40].numpy())
    options = [f"{key}={json.dumps(value)}" for key, value in fields(name).items()]
    command = ["train", "zoo:digits", "--data", f"npz:{tmp_path / 'tiny.npz'}", "--recipe", name, "--epochs", "1",
               *[word for option in options for word in ("--set", option)]]  # fmt: skip
    assert run([*command, "--out", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["recipe"] == name
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert set(record["config"]["options"]) == {field.name for field in dataclasses.fields(get(name))}
