"""Training recipes: what one step minimises, and what the shipped weights are worth."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust import zoo
from robust.attacks.whitebox.pgd import PGD
from robust.classifier import Classifier
from robust.cli.main import run
from robust.data import load_data
from robust.defenses.training.pgd_at import PGDAT
from robust.defenses.training.standard import Standard
from robust.errors import ConfigError, RobustError
from robust.fit import fit
from robust.learner import Learner
from robust.models import load_model
from robust.optimise import Settings
from robust.recipe import Recipe
from robust.threat import Linf
from robust.training import TrainConfig, load_train_config, measured, new_model, train_model

ROOT = Path(__file__).resolve().parent.parent.parent
TRAIN = ROOT / "experiments" / "train"
RESULTS = sorted((TRAIN / "results").glob("*.json"))


def batch(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(n, 1, 5, 5, generator=generator) * 0.4 + 0.3
    return x, torch.arange(n) % 3, torch.arange(n) + 50


def learner(*layers: nn.Module) -> Learner:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        stem = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()]
        module = nn.Sequential(*(layers or (*stem, nn.Linear(27, 3))))
    return Learner(module.train())


@pytest.fixture
def inner(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The points that the recipe's PGD returned."""
    found: list[Tensor] = []
    real = PGD.points

    def spy(self: PGD, *args: Any, **kwargs: Any) -> Tensor:
        found.append(real(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(PGD, "points", spy)
    return found


def test_standard_is_mean_cross_entropy_in_float64() -> None:
    clf = learner(nn.Flatten(), nn.Linear(25, 3))
    x, y, index = batch()
    loss = Standard().loss(clf, x, y, index, 0)
    weight, bias = (p.detach().double() for p in clf.module.parameters())
    logits = x.flatten(1).double() @ weight.T + bias
    expected = (logits.logsumexp(1) - logits.gather(1, y[:, None])[:, 0]).mean()
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-6)


def test_pgd_at_on_a_linear_model_is_the_worst_case_loss_in_closed_form() -> None:
    clf = learner(nn.Flatten(), nn.Linear(25, 2))
    x, _, index = batch()
    y = torch.arange(len(x)) % 2
    eps = 0.2  # away from the box, so that it does not bind
    loss = PGDAT(eps=eps, steps=10).loss(clf, x, y, index, 0)
    weight, bias = (p.detach().double() for p in clf.module.parameters())
    margin = (x.flatten(1).double() @ (weight[0] - weight[1]) + bias[0] - bias[1]) * (1 - 2 * y)
    worst = F.softplus(-(margin - eps * (weight[0] - weight[1]).abs().sum())).mean()
    assert float(loss.detach()) == pytest.approx(float(worst), rel=1e-5)


def test_pgd_at_is_the_cross_entropy_at_points_of_ball_and_box(inner: list[Tensor]) -> None:
    clf = learner()
    x, y, index = batch()
    loss = PGDAT(eps=0.4, steps=3, step_size=0.2).loss(clf, x, y, index, 7)
    [x_adv] = inner
    assert bool(Linf(0.4).inside(x_adv, x, (0.0, 1.0)).all())
    assert float(loss.detach()) == pytest.approx(float(F.cross_entropy(clf(x_adv), y).detach()), rel=1e-6)
    with clf.session():
        clean, attacked = (F.cross_entropy(clf(points), y, reduction="none") for points in (x, x_adv))
    assert float(attacked.mean()) > float(clean.mean())


def test_random_starts_differ_between_epochs_and_samples_and_not_between_batches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    starts: list[Tensor] = []
    real = Linf.random

    def spy(self: Linf, *args: Any, **kwargs: Any) -> Tensor:
        starts.append(real(self, *args, **kwargs))
        return starts[-1]

    monkeypatch.setattr(Linf, "random", spy)
    clf = learner()
    x = torch.full((6, 1, 5, 5), 0.5)
    y, index = torch.zeros(6, dtype=torch.int64), torch.arange(6)
    recipe = PGDAT(eps=0.2, steps=1)
    recipe.loss(clf, x, y, index, 1)
    recipe.loss(clf, x, y, index, 2)
    recipe.loss(clf, x[4:], y[4:], index[4:], 1)
    first, second, part = starts
    assert bool(((first - second)[:6].flatten(1).abs().amax(1) > 0.05).all())
    assert float((first[0] - first[1]).abs().max()) > 0.05
    assert torch.equal(part[:2], first[4:6])


def test_the_inner_attack_leaves_batch_statistics_gradients_and_mode_alone(inner: list[Tensor]) -> None:
    clf, twin = learner(), learner()
    statistics, wanted = (dict(c.module.named_buffers()) for c in (clf, twin))
    x, y, index = batch()
    PGDAT(eps=0.1, steps=4).loss(clf, x, y, index, 0)
    assert clf.module.training
    assert all(p.requires_grad and p.grad is None for p in clf.module.parameters())
    twin(inner[0])  # the outer loss is the only forward in training mode
    assert torch.equal(statistics["1.running_mean"], wanted["1.running_mean"])
    assert int(statistics["1.num_batches_tracked"]) == 1


def test_eps_rises_over_the_warm_up() -> None:
    recipe = PGDAT(eps=0.3, steps=5, step_size=0.1, warmup=2.0)
    assert recipe.at(0.0).eps == pytest.approx(0.0003)
    assert (recipe.at(1.0).eps, recipe.at(1.0).step_size) == pytest.approx((0.15, 0.05))
    assert recipe.at(2.0).eps == recipe.at(9.0).eps == 0.3
    assert PGDAT(eps=0.3).at(0.0).eps == 0.3


@pytest.mark.parametrize(
    "options",
    [{"eps": 0.0}, {"eps": float("nan")}, {"steps": 0}, {"step_size": 0.0}, {"warmup": -1.0}, {"norm": "l7"}],
)
def test_impossible_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RobustError, match=str(next(iter(options.values()))).replace(".0", r"(\\.0)?")):
        PGDAT(**{"eps": 0.1, **options})


def test_adversarial_training_trades_fragile_features_for_a_robust_one() -> None:
    """The construction of Tsipras et al. 2019 (arXiv:1805.12152): 19 sure pixels weaker than eps, a strong one that is
    right nine times in ten. Standard training uses the sure ones and falls; adversarial training uses the strong one.
    """
    y = torch.arange(60) % 2
    sign = (2 * y - 1).float()
    x = 0.5 + 0.05 * sign.view(-1, 1, 1, 1).expand(60, 1, 1, 20).clone()
    x[:, 0, 0, 0] = 0.5 + 0.3 * torch.where(torch.arange(60) % 20 < 18, sign, -sign)
    robust = {}
    for recipe in (Standard(), PGDAT(eps=0.1, steps=3)):
        weights = nn.Linear(20, 2)
        nn.init.zeros_(weights.weight)
        module = nn.Sequential(nn.Flatten(), weights).eval()
        clf = fit(
            Classifier(module, mean=0.5), (x, y), loss=recipe, epochs=40, batch_size=60, lr=0.05
        ).classifier
        success = PGD(threat=Linf(0.1), steps=10).run(clf, x, y).success
        robust[type(recipe).__name__] = 1 - float(success.double().mean())
    assert robust == pytest.approx({"Standard": 0.0, "PGDAT": 0.9})


# -- configurations and shipped weights -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(TRAIN.glob("*.toml")), ids=lambda path: path.stem)
def test_every_configuration_loads_and_has_its_record(path: Path) -> None:
    config = load_train_config(path)
    if not (TRAIN / "results" / f"{path.stem}.json").exists():
        assert f"`{path.stem}` has no record yet" in (TRAIN / "README.md").read_text()
        assert path.stem not in zoo.ENTRIES
        return
    record = json.loads((TRAIN / "results" / f"{path.stem}.json").read_text())
    found, wanted = record["config"], json.loads(json.dumps(asdict(config)))
    since = json.loads(json.dumps(asdict(TrainConfig(fit=Settings(epochs=1)))))
    assert {**since["fit"], **found.pop("fit")} == wanted.pop("fit"), "what came later stands at its default"
    assert {**since, "fit": None, **found} == {**wanted, "fit": None}


def test_the_cards_say_what_the_records_say() -> None:
    cards = (TRAIN / "README.md").read_text()
    for path in RESULTS:
        found = json.loads(path.read_text())["measured"]
        clean = f"{100 * found['clean_accuracy']:.1f} % of {found['n']}"
        pgd = f"{100 * found['pgd_accuracy']:.1f} % of {found['pgd']['n']}"
        [row] = [line for line in cards.splitlines() if line.startswith(f"| `{path.stem}` ")]
        assert clean in row
        assert f"{pgd} (PGD-{found['pgd']['steps']}, {found['pgd']['norm']} {found['pgd']['eps']:g})" in row


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_the_record_is_of_the_shipped_weights(path: Path) -> None:
    record = json.loads(path.read_text())
    weights = zoo.WEIGHTS / f"{path.stem}.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == record["weights_sha256"]
    assert weights.stat().st_size < 3_000_000


@pytest.mark.parametrize("name", ["digits", "digits-at"])
def test_the_shipped_digits_weights_measure_what_their_record_says(name: str) -> None:
    record = json.loads((TRAIN / "results" / f"{name}.json").read_text())["measured"]
    found = measured(load_train_config(TRAIN / f"{name}.toml"), load_model(f"zoo:{name}", device="cpu"))
    assert found["clean_accuracy"] == record["clean_accuracy"]
    assert found["pgd_accuracy"] == pytest.approx(record["pgd_accuracy"], abs=0.01)
    assert record["clean_accuracy"] >= 0.98


def test_a_repeat_of_the_embedded_default_reaches_its_record(tmp_path: Path) -> None:
    record = json.loads((TRAIN / "results" / "digits.json").read_text())["measured"]
    _, found = train_model(load_train_config(TRAIN / "digits.toml"), tmp_path, device="cpu")
    assert found["clean_accuracy"] == pytest.approx(record["clean_accuracy"], abs=0.01)


def test_first_weights_are_keyed_by_the_seed() -> None:
    config = load_train_config(TRAIN / "digits.toml")
    first, again = (new_model(config, 10, None, "cpu").digest() for _ in range(2))
    other = new_model(replace(config, fit=replace(config.fit, seed=1)), 10, None, "cpu").digest()
    assert first == again != other


# -- command line -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """60 of the digits, as a user's own file."""
    import numpy as np

    x, y = load_data("digits", n=60).tensors()
    np.savez(tmp_path / "tiny.npz", x=x.numpy(), y=y.numpy())
    return f"npz:{tmp_path / 'tiny.npz'}"


def test_the_command_trains_measures_and_resumes(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "zoo:digits", "--data", tiny, "--recipe", "pgd-at", "--eps", "8/255", "--set", "steps=2",
               "--set", "fit.ema=0.5", "--epochs", "2", "--out", str(out), "--json"]  # fmt: skip
    assert run(command) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["recipe"] == "pgd-at"
    assert summary["out"] == str(out)
    assert 0 <= summary["clean_accuracy"] <= 1
    record = json.loads((out / "train.json").read_text())
    assert record["config"]["options"]["eps"] == pytest.approx(8 / 255)
    assert record["config"]["fit"]["ema"] == 0.5
    assert record["measured"]["part"] == "all"
    trained = load_model("zoo:digits", weights=out / "model.safetensors", device="cpu")
    assert trained.logits(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert run(command) == 2
    assert "already holds a training" in capsys.readouterr().err
    assert run([*command[:-1], "--resume"]) == 0
    assert "clean accuracy" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--recipe", "pdg-at"], "did you mean pgd-at"),
        (["--recipe", "pgd-at"], "missing key 'eps'"),
        (["--recipe", "pgd-at", "--eps", "-1"], "eps"),
        (["--recipe", "pgd-at", "--eps", "0.1", "--set", "stepz=3"], "did you mean 'steps'"),
        (["--recipe", "pgd-at", "--eps", "0.1", "--set", "steps"], "write KEY=VALUE"),
        (["--set", "fit.epoch=3"], "did you mean 'epochs'"),
        (["--epochs", "0"], "epochs=0"),
        (["--lr", "nan"], "lr=nan"),
        (["--config", "missing.toml"], "cannot read"),
        (["--weights", "missing.safetensors"], "does not exist"),
        (["--device", "cuda:77"], "not on this machine"),
        (["zoo:digit", "--data", "digits"], "did you mean"),
        (["zoo:lenet5"], "--data is missing"),
        (["zoo:lenet5", "--data", "digits"], "fails on inputs of shape (16, 1, 8, 8)"),
        (["--data", "digit"], "did you mean"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (('recipe = "pgd-at"', 'recipe = "pgd-ta"'), r"bad\.toml: unknown recipe"),
        (
            ("step_size", "stepsize"),
            r"bad\.toml:11: unknown key 'stepsize' in \[options\]; did you mean 'step_size'",
        ),
        (("warmup = 8.0", "warmup = -8.0"), r"bad\.toml:7: .*warmup=-8\.0"),
        (("epochs = 60", "epochs = '60'"), r"bad\.toml:\d+: fit\.epochs is '60'; it must be an integer"),
    ],
)
def test_a_faulty_configuration_is_refused_with_its_line(
    change: tuple[str, str], line: str, tmp_path: Path
) -> None:
    text = (TRAIN / "digits-at.toml").read_text()
    assert change[0] in text
    (tmp_path / "bad.toml").write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=line):
        load_train_config(tmp_path / "bad.toml")


def test_a_recipe_beside_a_configuration_of_another_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--config", str(TRAIN / "digits.toml"), "--recipe", "pgd-at", "--eps", "0.1"]) == 2
    assert "leave out one of them" in capsys.readouterr().err


def test_a_recipe_without_a_loss_says_so() -> None:
    with pytest.raises(NotImplementedError, match="Recipe defines no loss"):
        Recipe().loss(Classifier(nn.Flatten()), *batch(), 0)
