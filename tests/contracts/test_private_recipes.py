"""What holds for every recipe with differential privacy: it trains by its own definition, or is refused in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust.cli.main import run
from robust.defenses.privacy.walk import Walk
from robust.defenses.training import REGISTRY, get
from robust.errors import ConfigError
from robust.fit import FitResult, fit
from robust.learner import Learner
from robust.privacy import Privacy
from robust.rng import derive
from tests.contracts.recipe_subjects import digits, fields, make, network

NAMES = sorted(REGISTRY)
REFUSED = [name for name in NAMES if get(name).unprivate()]
ALLOWED = [name for name in NAMES if name not in REFUSED]
BOUND, RATE, BATCH, COUNT = 0.5, 0.1, 8, 20


def train(name: str, out: Path | None = None, **options: Any) -> FitResult:
    """One epoch of a private training without noise, unless told otherwise."""
    chosen = {"epochs": 1, "batch_size": BATCH, "optimizer": "sgd", "momentum": 0.0, "lr": RATE, **options}
    chosen.setdefault("privacy", Privacy(noise_multiplier=0.0, delta=1e-4, max_grad_norm=BOUND))
    return fit(network(norm=False), digits(COUNT), loss=make(name), out=out, schedule="constant", **chosen)


def steps_by_a_loop(name: str, drawn: list[Tensor]) -> dict[str, Tensor]:
    """The definition: each sample's gradient by itself, in float64, clipped to the bound and added up."""
    module, recipe, (x, y) = network(norm=False).train(), make(name), digits(COUNT)
    for step, rows in enumerate(drawn):
        seed = derive(derive(derive(0, "epoch", 0), "step", step), "copy", 0)
        total = [torch.zeros_like(p, dtype=torch.float64) for p in module.parameters()]
        for row in rows:
            index = row[None]
            gradient = one_gradient(module, recipe.at(step / 2), x[index], y[index], index, seed)
            norm = float(torch.stack([g.norm() for g in gradient]).norm())
            for so_far, g in zip(total, gradient, strict=True):
                so_far += g * min(1.0, BOUND / norm)
        with torch.no_grad():
            for parameter, so_far in zip(module.parameters(), total, strict=True):
                parameter -= (RATE * so_far / BATCH).float()
    return module.state_dict()


def one_gradient(
    module: nn.Module, recipe: Any, x: Tensor, y: Tensor, index: Tensor, seed: int
) -> list[Tensor]:
    """One sample's gradient: points by the recipe in float32, as they are in training; the outer loss in float64."""
    clf = Learner(module)
    with clf.session():
        clf.check(x)
    if not hasattr(recipe, "adversarial"):
        return double_gradient(module, lambda learner: recipe.loss(learner, x.double(), y, index, seed))
    points = recipe.adversarial(clf, x, y, index, seed)
    return double_gradient(module, lambda learner: recipe.outer(learner, x.double(), points.double(), y))


def double_gradient(module: nn.Module, loss: Any) -> list[Tensor]:
    """The weight gradient of a loss by a copy of the module in float64."""
    exact = copy.deepcopy(module).double()
    learner = Learner(exact)
    learner.mean, learner.std = learner.mean.double(), learner.std.double()
    return list(torch.autograd.grad(loss(learner), list(exact.parameters())))


@pytest.mark.parametrize("name", ALLOWED)
def test_a_private_step_is_the_sum_of_clipped_gradients_of_single_samples(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Tensor] = []
    rows = Walk.rows

    def noted(self: Walk, step: int) -> Tensor:
        drawn.append(rows(self, step))
        return drawn[-1]

    monkeypatch.setattr(Walk, "rows", noted)
    found = train(name, accumulate=3).classifier.module.state_dict()
    assert len(drawn) == 2
    start, expected = network(norm=False).state_dict(), steps_by_a_loop(name, drawn)
    for key, value in expected.items():
        moved = value - start[key]
        torch.testing.assert_close(found[key] - start[key], moved, rtol=2e-3, atol=1e-3 * float(moved.norm()))


@pytest.mark.parametrize("name", ALLOWED)
def test_the_record_of_a_private_training_has_nothing_without_noise(name: str) -> None:
    result = train(name, privacy=Privacy(noise_multiplier=1.0, delta=1e-4))
    assert [set(entry) for entry in result.history] == [{"epoch", "lr"}]
    assert result.record["training"]["data"] == f"({COUNT}, 1, 8, 8)"
    assert result.record["warnings"] == []
    told = result.record["privacy"]
    assert told["epsilon"] > 0
    assert (told["delta"], told["accountant"], told["steps"], told["sample_rate"]) == (1e-4, "pld", 2, 0.4)


@pytest.mark.parametrize("name", REFUSED)
def test_a_recipe_whose_gradients_are_no_samples_own_is_refused(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="cannot be trained with differential privacy: it "):
        train(name, tmp_path / "python")
    options = [f"{key}={value}" for key, value in fields(name).items()]
    command = ["train", "--recipe", name, *[word for option in options for word in ("--set", option)]]
    command += ["--dp-epsilon", "3", "--dp-delta", "1e-5", "--dp-fix", "--out", str(tmp_path / "run")]
    assert run(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_that_mixes_samples_says_so() -> None:
    """The claim of `Recipe.unprivate`, measured: a sample's share of a batch's loss does not depend on the others."""
    x, y = digits(60)
    for name in NAMES:
        clf, recipe = Learner(network(norm=False).train()), make(name)
        with clf.session():
            clf.check(x[:4])
        index = torch.arange(8)
        whole = float(recipe.loss(clf, x[:8], y[:8], index, 3).detach())
        alone = [
            float(recipe.loss(clf, x[i, None], y[i, None], index[i, None], 3).detach()) for i in range(8)
        ]
        mixed = whole != pytest.approx(sum(alone) / 8, rel=1e-4)
        assert mixed <= bool(get(name).unprivate()), name


def test_the_list_says_which_recipes_can_be_private(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "recipes", "--json"]) == 0
    rows = {row["name"]: row["private"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows == {name: "no" if name in REFUSED else "yes" for name in NAMES}
    assert REFUSED == ["awp", "free", "mixup"]
