"""What `robust train` refuses to make private, in one line, and what it does from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from robust.checkpoint import WEIGHTS
from robust.cli.main import run
from robust.data import load_data
from robust.defenses.training import get
from robust.errors import ConfigError, ModelError
from robust.models import load_model
from robust.optimise import Settings
from robust.parallel import Group
from robust.privacy import Privacy, refuse
from robust.training import HoldOut, TrainConfig
from tests.contracts.recipe_subjects import digits
from tests.defenses.private_training_parts import COUNT, private_fit


def test_several_processes_and_compiled_passes_are_refused() -> None:
    recipe = get("standard")()
    with pytest.raises(ConfigError, match="2 processes cannot share"):
        refuse(recipe, Settings(epochs=1), Group(0, 2), 500)
    with pytest.raises(ConfigError, match="compiled=true cannot"):
        refuse(recipe, Settings(epochs=1, compiled=True), Group(), 500)
    with pytest.raises(ConfigError, match="batch_size=128 cannot be the expected size"):
        refuse(recipe, Settings(epochs=1), Group(), 100)
    with pytest.raises(ConfigError, match="alignment differentiates a gradient"):
        refuse(get("fast")(eps=0.1, alignment=0.2), Settings(epochs=1), Group(), 500)


def test_samples_held_out_are_training_data_too() -> None:
    with pytest.raises(ConfigError, match="hold_out cannot be combined with differential privacy"):
        TrainConfig(
            fit=Settings(epochs=1), hold_out=HoldOut(), privacy=Privacy(noise_multiplier=1.0, delta=1e-4)
        )


@pytest.mark.parametrize("affine", [True, False])
def test_batch_normalisation_is_refused_by_name_and_evaluation_mode_does_not_hide_it(affine: bool) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, affine=affine), nn.Flatten(), nn.Linear(72, 10))
    with pytest.raises(ModelError, match=r"^1(\.weight)? belongs to a BatchNorm2d.*--dp-fix"):
        private_fit(model=net.eval(), privacy={})


PRIVATE = ["--dp-noise-multiplier", "1", "--dp-delta", "1e-4"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (PRIVATE, "bn1.weight belongs to a BatchNorm2d"),
        (["--dp-epsilon", "3", "--dp-fix"], "lacks its delta"),
        (["--dp-delta", "1e-4", "--dp-fix"], "lacks its measure"),
        (["--dp-fix"], "--dp-fix: this training is not private"),
        ([*PRIVATE, "--dp-fix", "--set", "fit.compiled=true"], "compiled=true cannot"),
        ([*PRIVATE, "--dp-fix", "--batch-size", "2000"], "batch_size=2000 cannot"),
        ([*PRIVATE, "--dp-fix", "--dp-clipping", "none"], "clipping=none"),
        ([*PRIVATE, "--dp-fix", "--recipe", "fast", "--eps", "0.1", "--set", "alignment=0.2"], "alignment"),
        (["--dp-noise-multiplier", "lots", "--dp-delta", "1e-4"], "is not a number"),
    ],
)
def test_what_cannot_be_private_is_one_line_and_writes_nothing(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command_trains_by_a_configuration_and_the_model_can_be_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    (tmp_path / "dp.toml").write_text(
        'model = "zoo:digits"\ndata = "digits"\nrecipe = "standard"\n[fit]\nepochs = 2\nbatch_size = 256\nlr = 1e-2\n'
        '[privacy]\nnoise_multiplier = 1.0\ndelta = 1e-4\naccountant = "zcdp"\n'
    )
    command = ["train", "--config", str(tmp_path / "dp.toml"), "--dp-fix", "--dp-max-grad-norm", "0.5"]
    assert run([*command, "--out", str(out), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    told = answer["privacy"]
    assert told == json.loads((out / "train.json").read_text())["privacy"]
    assert (told["max_grad_norm"], told["steps"], told["delta"]) == (0.5, 10, 1e-4)
    assert told["epsilon"] > 0
    assert answer["loss"] is None
    clf = load_model("groupnorm:zoo:digits", weights=out / WEIGHTS, device="cpu")
    data = load_data("digits")
    x, y = data.tensors()
    assert float((clf.logits(x).argmax(1) == y).double().mean()) == answer["clean_accuracy"] > 0.2
    assert run([*command, "--out", str(out), "--resume"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "robust eval groupnorm:zoo:digits" in shown
    assert f"epsilon at most {told['epsilon']:.4g} at delta 0.0001 (zcdp)" in shown


def test_training_samples_are_no_test_of_a_private_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = digits(COUNT)
    np.savez(tmp_path / "own.npz", x=x.numpy(), y=y.numpy())
    command = ["train", "zoo:digits", "--data", f"npz:{tmp_path / 'own.npz'}", "--epochs", "1"]
    command += [
        "--batch-size",
        "12",
        *PRIVATE,
        "--dp-accountant",
        "zcdp",
        "--dp-fix",
        "--out",
        str(tmp_path / "run"),
    ]
    assert run(command) == 0
    assert "not measured: there are training samples only" in " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "run" / "train.json").read_text())
    assert record["measured"] == {"part": "all", "n": 0, "clean_accuracy": None}
