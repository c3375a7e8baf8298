"""Single-step recipes against their papers' algorithms, their collapse, and their resume after a kill."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.classifier import Classifier, RobustWarning
from robust.cli.main import run
from robust.data import load_data
from robust.defenses.training.ensemble_at import EnsembleAT
from robust.defenses.training.fast import Fast, misalignment
from robust.defenses.training.fgsm_at import FGSMAT
from robust.defenses.training.free import Free
from robust.defenses.training.pgd_at import PGDAT
from robust.errors import ModelError, ThreatError
from robust.fit import fit
from robust.learner import Learner
from robust.rng import Draws
from robust.threat import Linf
from robust.zoo.digits import DigitsNet
from tests.contracts import recipe_subjects as small
from tests.defenses.recipe_parts import batch, descent, network, softmax
from tests.robust.training_parts import same

ROOT = Path(__file__).resolve().parent.parent.parent


def test_fgsm_at_is_the_papers_mixture_on_a_linear_model() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(25, 2))
    clf = Learner(module)
    x, _, index = batch()
    x, y = x * 0.4 + 0.3, torch.arange(12) % 2
    weight, bias = (p.detach().double() for p in module.parameters())
    margin = (x.flatten(1).double() @ (weight[0] - weight[1]) + bias[0] - bias[1]) * (1 - 2 * y)
    clean, worst = (
        F.softplus(-margin).mean(),
        F.softplus(0.2 * (weight[0] - weight[1]).abs().sum() - margin).mean(),
    )
    for ratio in (0.5, 0.25, 0.0):
        loss = FGSMAT(eps=0.2, ratio=ratio).loss(clf, x, y, index, 0)
        assert float(loss.detach()) == pytest.approx(float(ratio * clean + (1 - ratio) * worst), rel=1e-5)


def test_alignment_is_the_papers_cosine_and_reaches_the_weights() -> None:
    x, y, index = batch()
    recipe, bare = Fast(eps=0.2, alignment=0.7), Fast(eps=0.2)
    losses, slopes = [], []
    for each in (recipe, bare):
        clf = Learner(network())
        loss = each.loss(clf, x, y, index, 5)
        losses.append(float(loss.detach()))
        slopes.append(descent(clf.module, loss))
    nearby = Linf(0.2).random(x, (0.0, 1.0), Draws(5, "alignment", index))
    module = network().double()
    inputs = [part.double().requires_grad_(True) for part in (x, nearby)]
    first, second = (
        torch.autograd.grad(F.cross_entropy(module(p), y, reduction="sum"), p, create_graph=True)[0]
        for p in inputs
    )
    cosines = [(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(first, second, strict=True)]
    expected = 0.7 * (1 - torch.stack(cosines).mean())
    assert losses[0] - losses[1] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(expected.detach()) > 0.01
    for with_it, without, wanted in zip(*slopes, descent(module, expected), strict=True):
        torch.testing.assert_close((with_it - without).double(), wanted, rtol=1e-3, atol=1e-4)
    assert (recipe.second_order, bare.second_order) == (True, False)


def test_rows_without_a_gradient_do_not_count_in_the_alignment() -> None:
    first, second = torch.eye(3), torch.eye(3) * 1e-30
    first[0] = 0
    assert float(misalignment(first, second)) == pytest.approx(0.0, abs=1e-6)
    assert float(misalignment(torch.zeros(2, 3), torch.ones(2, 3))) == 0.0


def test_free_is_the_papers_algorithm() -> None:
    """Plain SGD on a linear model, replay by replay, in float64; δ passes from batch to batch."""
    x, y, _ = batch(20)
    y, eps, rate = y % 2, 0.15, 0.2

    def linear() -> nn.Sequential:
        torch.manual_seed(3)
        return nn.Sequential(nn.Flatten(), nn.Linear(25, 2))

    seen: list[Tensor] = []

    class Spy(Free):
        def step(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, *rest: Any) -> Any:
            seen.append(index)
            return super().step(clf, x, y, index, *rest)

    with torch.random.fork_rng():
        module, mirror = linear(), linear().double()
    result = fit(module, (x, y), loss=Spy(eps=eps, replays=3), epochs=2, batch_size=8, lr=rate, optimizer="sgd",
                 momentum=0.0, schedule="constant")  # fmt: skip
    assert len(seen) == 2 * 3 * 3
    weight, bias = (p.detach().clone() for p in mirror.parameters())
    delta, losses = torch.zeros(8, 25, dtype=torch.float64), []
    for rows in seen:
        points = (x[rows].flatten(1).double() + delta[: len(rows)]).clamp(0, 1)
        logits = points @ weight.T + bias
        error = softmax(logits) - F.one_hot(y[rows], 2)
        losses.append(float(F.cross_entropy(logits, y[rows])) * len(rows))
        uphill = error @ weight
        weight, bias = weight - rate * error.T @ points / len(rows), bias - rate * error.mean(0)
        delta[: len(rows)] = (delta[: len(rows)] + eps * uphill.sign()).clamp(-eps, eps)
    for a, b in itertools.pairwise(seen[:3]):
        assert torch.equal(a, b), "a batch is replayed"
    torch.testing.assert_close(module[1].weight.detach().double(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module[1].bias.detach().double(), bias, rtol=1e-4, atol=1e-5)
    assert result.history[0]["loss"] == pytest.approx(sum(losses[:9]) / 60, rel=1e-4)


def test_ensemble_at_draws_every_source_and_its_step_is_the_source_s() -> None:
    x, y = small.digits()
    recipe, clf = EnsembleAT(eps=0.1, models=("zoo:digits", "at=zoo:digits-at")), small.learner(norm=False)
    index = torch.arange(len(x))
    points = recipe.adversarial(clf, x, y, index, 3)
    steps = [recipe.attack()(source, x, y) for source in (*recipe.static(clf), clf)]
    same = torch.stack([(points - step).flatten(1).abs().amax(1) < 1e-6 for step in steps])
    assert bool(same.any(0).all())
    assert bool((same.sum(1) > len(x) / 5).all()), "each source is drawn for about a third"


def test_static_models_of_another_task_are_refused() -> None:
    x, _ = small.digits()
    with pytest.raises(ModelError, match="zoo:cifar10-convnet cannot stand beside Sequential: mean has 3"):
        EnsembleAT(eps=0.1, models="zoo:cifar10-convnet").check(small.learner(), x[:4])
    fewer = Learner(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)))
    with fewer.session():
        fewer.check(x[:4])
    with pytest.raises(ModelError, match="zoo:digits has 10 classes, Sequential has 3"):
        EnsembleAT(eps=0.1, models="zoo:digits").check(fewer, x[:4])
    with pytest.raises(ThreatError, match="did you mean 8/255"):
        fit(small.network(), small.digits(), loss=PGDAT(eps=8), epochs=1)


def test_a_static_model_that_cannot_be_had_is_one_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--recipe", "ensemble-at", "--eps", "0.1", "--out", str(tmp_path / "run")]
    for model in ("zoo:digit", "zoo:lenet5"):
        assert run([*command, "--set", f"models={model}"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: models: ")
        assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


# -- collapse -----------------------------------------------------------------------------------------------------


def entry(epoch: int, own: float, pgd: float) -> dict[str, float]:
    return {"epoch": float(epoch), "own_step_accuracy": own, "pgd_probe_accuracy": pgd}


def test_a_single_step_training_that_collapses_says_so_once(tmp_path: Path) -> None:
    """FGSM without a random start at a large eps: the network learns to mislead the one step."""
    torch.manual_seed(0)
    data = load_data("digits", train=True, n=600)
    with pytest.warns(RobustWarning, match=r"^catastrophic overfitting in epoch \d: [^\n]*$") as caught:
        result = fit(DigitsNet(), data, loss=FGSMAT(eps=0.3), epochs=4, batch_size=60, lr=3e-3,
                     schedule="constant", out=tmp_path)  # fmt: skip
    [warning] = [str(w.message) for w in caught]
    last = result.history[-1]
    assert last["own_step_accuracy"] - last["pgd_probe_accuracy"] >= 0.2
    assert last["pgd_probe_accuracy"] < 0.1
    assert result.record["warnings"] == [warning]
    assert json.loads((tmp_path / "train.json").read_text())["warnings"] == [warning]


def test_the_first_sudden_gap_is_told_with_what_was_there_before() -> None:
    recipe = Fast(eps=0.1)
    history = [entry(1, 0.41, 0.38), entry(2, 0.5, 0.45), entry(3, 0.9, 0.02), entry(4, 0.95, 0.0)]
    assert recipe.doubts(history[:2]) == []
    [line] = recipe.doubts(history[:3])
    assert "in epoch 3: accuracy is 90.0% under the recipe's own step, but 2.0% under PGD-10" in line
    assert "(before it was up to 45.0%)" in line
    assert recipe.doubts(history) == [line]
    assert recipe.doubts([entry(1, 0.15, 0.0), entry(2, 0.6, 0.35)]) == [], (
        "weak from the start, or hardly masked"
    )
    assert recipe.doubts([{"epoch": 1.0, "loss": 2.0}]) == []


def test_the_command_shows_a_collapse_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(*_: object) -> dict[str, float]:
        return {"own_step_accuracy": 0.9, "pgd_probe_accuracy": 0.0}

    monkeypatch.setattr(Fast, "probe", collapsed)
    command = ["train", "zoo:digits", "--data", "digits", "--recipe", "fast", "--eps", "0.1", "--epochs", "1",
               "--batch-size", "400", "--out", str(tmp_path / "run")]  # fmt: skip
    assert run([*command, "--json"]) == 0
    [line] = json.loads(capsys.readouterr().out)["warnings"]
    assert line.startswith("catastrophic overfitting in epoch 1: accuracy is 90.0%")
    assert run([*command, "--resume"]) == 0
    assert "catastrophic overfitting in epoch 1" in " ".join(capsys.readouterr().out.split())


def test_the_probe_sees_what_a_bent_gradient_hides() -> None:
    """A sawtooth over a linear model: one step of eps lands where the loss is low again, shorter ones do not."""

    class Sawtooth(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean = x.flatten(1).mean(1)
            margin = torch.cos((mean - 0.5) * (2 * torch.pi / 0.1) + 0.3)  # the same after 0.1, less half way
            return torch.stack([margin, -margin], dim=1)

    clf = Classifier(Sawtooth())
    x = torch.full((40, 1, 4, 4), 0.5)
    found = FGSMAT(eps=0.1).probe(clf, x, torch.zeros(40, dtype=torch.int64), torch.arange(40), 0)
    assert found["own_step_accuracy"] == 1.0
    assert found["pgd_probe_accuracy"] < 0.1


# -- kill and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "step"), [("free", 4), ("awp", 4)])
def test_a_training_killed_in_the_middle_ends_with_the_same_bits(
    name: str, step: int, tmp_path: Path
) -> None:
    """Free's fourth step is the first replay of its second batch: δ comes from the checkpoint."""
    whole = small.train(name)
    command = [sys.executable, "-m", "tests.contracts.recipe_subjects", name, str(tmp_path), str(step)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False, timeout=300).returncode
    assert code == -signal.SIGKILL
    resumed = small.train(name, tmp_path, resume=True)
    assert same(whole.classifier.module.state_dict(), resumed.classifier.module.state_dict())
    assert whole.history == resumed.history


def test_without_its_delta_free_would_end_elsewhere() -> None:
    whole = small.train("free")

    class Forgetful(Free):
        def step(self, *arguments: Any) -> Any:
            loss, _ = super().step(*arguments)
            return loss, {}

    with_none = small.train("free", loss=Forgetful(**small.fields("free")))
    assert not same(whole.classifier.module.state_dict(), with_none.classifier.module.state_dict())
