"""What must not undo differential privacy: errors on the way, folders, models, files and losses that are others."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from robust import Classifier
from robust.checkpoint import CHECKPOINT
from robust.cli.main import run
from robust.defenses.privacy.noise import KeyedNoise, content_key
from robust.digest import write_atomic
from robust.errors import ModelError, RunError
from robust.fit import fit
from robust.losses import cross_entropy
from robust.privacy import LEDGER, Privacy
from tests.contracts.recipe_subjects import digits
from tests.defenses.private_training_parts import BATCH, COUNT, STEPS, booked, module, private_fit
from tests.defenses.test_private_training import ZCDP, Stopped


def stopped_after(folder: Path, steps: int, **changed: Any) -> Path:
    """A run folder whose training was interrupted after some steps, each of them in its checkpoint."""

    def stopping(event: Any) -> None:
        if event.step == steps:
            raise Stopped

    with pytest.raises(Stopped):
        private_fit(folder, progress=stopping, **{"checkpoint_seconds": 0.0, **changed})
    return folder


# -- errors leave the module alone ----------------------------------------------------------------------------------


def mean_loss(clf: Any, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
    """A bare loss."""
    return cross_entropy(clf(x), y).mean()


def untouched(net: nn.Module) -> bool:
    """Whether no layer and no hook of the privacy machinery is left in a module found in evaluation mode."""
    hooked = bool(net._forward_pre_hooks or net._forward_hooks)
    tapped = any("forward" in part.__dict__ for part in net.modules())
    return not hooked and not tapped and not any(part.training for part in net.modules())


def test_an_error_before_the_first_step_leaves_the_model_as_it_was_found(tmp_path: Path) -> None:
    net = module().eval()
    options: dict[str, Any] = {
        "loss": mean_loss,
        "epochs": 1,
        "batch_size": BATCH,
        "privacy": Privacy(**ZCDP),
    }
    with pytest.raises(RunError, match="nowhere to write"):
        fit(net, digits(COUNT), tensorboard=True, **options)
    assert untouched(net)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        fit(net, digits(COUNT), out=tmp_path / "file" / "run", **options)
    assert untouched(net)
    stopped_after(tmp_path / "other", 1)
    with pytest.raises(RunError, match="belongs to a training with"):
        fit(net, digits(COUNT), out=tmp_path / "other", resume=True, **options)
    assert untouched(net)
    fit(net, digits(COUNT), **options)


def test_a_model_that_is_refused_is_left_in_the_mode_it_was_found_in() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(72, 10)).eval()
    with pytest.raises(ModelError, match="BatchNorm2d"):
        private_fit(model=net, privacy={})
    assert untouched(net)


# -- a ledger belongs to its checkpoint -----------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True])
def test_a_checkpoint_whose_steps_are_not_in_its_ledger_is_not_resumed(secure: bool, tmp_path: Path) -> None:
    asked = {"secure_mode": secure}
    first = stopped_after(tmp_path / "first", 3, privacy=asked)
    assert booked(first) == 3
    (copied := tmp_path / "copied").mkdir()
    shutil.copy(first / CHECKPOINT, copied)
    (first / LEDGER).unlink()
    for folder in (first, copied):
        with pytest.raises(RunError, match=r"0 steps booked, but .* has taken 3"):
            private_fit(folder, resume=True, privacy=asked)
        assert not (folder / LEDGER).exists()


def test_a_finished_training_does_not_report_less_than_it_spent(tmp_path: Path) -> None:
    private_fit(tmp_path, epochs=1)
    lines = (tmp_path / LEDGER).read_bytes().splitlines(keepends=True)
    (tmp_path / LEDGER).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(RunError, match=r"4 steps booked, but .* has taken 5"):
        private_fit(tmp_path, epochs=1, resume=True)


# -- the same noise never covers two different sums -----------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 3])
def test_noise_that_nobody_keyed_is_a_function_of_the_sum_that_it_covers(step: int) -> None:
    """The difference of two releases with the same noise would have none."""
    source = KeyedNoise(7, by_sum=True)
    zeros, other = torch.zeros(5000), torch.zeros(5000)
    other[17] = 1e-30
    first, second = source.add(zeros, 1.0, step), source.add(other, 1.0, step)
    assert torch.equal(first, source.add(zeros.clone(), 1.0, step))
    assert abs(float(torch.corrcoef(torch.stack((first, second)))[0, 1])) < 0.1
    assert torch.equal(KeyedNoise(7).add(zeros, 1.0, step), KeyedNoise(7).add(other, 1.0, step))
    assert source.normal(step, 3.0) == source.normal(step, 3.0) != source.normal(step, 4.0)


def test_the_key_of_a_sum_on_a_device_depends_on_every_number_and_its_place() -> None:
    flat = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    seen = {content_key(flat)}
    for place in range(0, 999, 37):
        changed = flat.clone()
        changed[place] = torch.nextafter(changed[place], torch.tensor(torch.inf))
        swapped = flat.clone()
        swapped[place], swapped[place + 1] = flat[place + 1], flat[place]
        seen |= {content_key(changed), content_key(swapped)}
    assert len(seen) == 1 + 2 * len(range(0, 999, 37))
    assert content_key(flat.double()) != content_key(flat) == content_key(flat.clone())


def other_dropout() -> nn.Module:
    """The same weights in a module that does something else with them."""
    net = module()
    net[3] = nn.Dropout(0.5)
    return net


def frozen_bias() -> nn.Module:
    """The same weights, one of which is not trained."""
    net = module()
    net[1].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: Classifier(module(), mean=0.5), "mean"),
        (lambda: Classifier(module(), std=2.0), "std"),
        (lambda: Classifier(module(), bounds=(-1.0, 1.0)), "bounds"),
        (other_dropout, "network"),
        (frozen_bias, "network"),
    ],
)
def test_a_training_is_not_resumed_with_another_model(model: Any, name: str, tmp_path: Path) -> None:
    stopped_after(tmp_path, 2)
    with pytest.raises(RunError, match=f"belongs to a training with {name}="):
        private_fit(tmp_path, resume=True, model=model())


def test_elsewhere_the_steps_that_are_repeated_are_others_and_are_paid_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another library or processor rounds otherwise."""
    stopped_after(tmp_path, 2, checkpoint_seconds=100)
    secret = int(load_file(tmp_path / CHECKPOINT)["private/seed"])
    monkeypatch.setattr("robust.defenses.privacy.walk.place", lambda: 5)
    stopped_after(tmp_path, 4, resume=True)
    assert int(load_file(tmp_path / CHECKPOINT)["private/seed"]) != secret
    assert booked(tmp_path) == 2 + 4
    result = private_fit(tmp_path, resume=True)
    assert booked(tmp_path) == result.record["privacy"]["steps"] == 2 + STEPS


# -- nothing of a sample but its clipped gradient -------------------------------------------------------------------


def twice(clf: Any, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
    """A loss that shows the model every sample twice in one batch, each of them clipped by itself."""
    return cross_entropy(clf(torch.cat([x, 1 - x])), torch.cat([y, y])).mean()


def inside(clf: Any, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
    """A loss that differentiates the weights by itself, too."""
    cross_entropy(clf(x), y).mean().backward()
    return cross_entropy(clf(1 - x), y).mean()


@pytest.mark.parametrize("loss", [twice, inside])
def test_a_loss_in_which_a_sample_has_more_than_one_share_is_refused(loss: Any) -> None:
    with pytest.raises(ModelError, match="more than one share"):
        private_fit(loss=loss)


def test_a_buffer_that_samples_move_is_refused_by_name() -> None:
    class Counts(nn.Module):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)
            self.register_buffer("mean", torch.zeros(64))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.mean.lerp_(x.detach().flatten(1).mean(0), 0.1)
            found: Tensor = self.layer(x.flatten(1))
            return found

    with pytest.raises(ModelError, match=r"buffer mean changes .* without noise"):
        private_fit(model=Counts(), privacy={})


# -- nothing without noise is left or shown -------------------------------------------------------------------------


def test_the_last_checkpoint_has_no_digest_of_the_data_and_the_training_can_be_taken_up(
    tmp_path: Path,
) -> None:
    def told() -> Any:
        with safe_open(tmp_path / CHECKPOINT, framework="pt") as file:
            return json.loads(file.metadata()["identity"])["data"]

    stopped_after(tmp_path, 1)
    assert "sha256" in told()
    result = private_fit(tmp_path, resume=True)
    assert told() == "(60, 1, 8, 8)"
    assert private_fit(tmp_path, resume=True).record["privacy"] == result.record["privacy"]
    with pytest.raises(RunError, match="belongs to a training with lr="):
        private_fit(tmp_path, resume=True, lr=0.4)


def test_a_secret_file_is_its_owners_alone_whatever_lay_in_its_way(tmp_path: Path) -> None:
    left = tmp_path / ".file.part"
    left.write_text("left by a kill")
    left.chmod(0o644)
    reader = os.open(left, os.O_RDONLY)
    write_atomic(tmp_path / "file", b"secret", secret=True)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert os.read(reader, 100) == b"left by a kill"
    os.close(reader)


def test_the_loss_of_a_private_training_is_not_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robust.cli.progress.QUIET_SECONDS", 0.0)
    command = ["train", "--batch-size", "256", "--epochs", "1"]
    private = ["--dp-noise-multiplier", "1", "--dp-delta", "1e-4", "--dp-accountant", "zcdp", "--dp-fix"]
    assert run([*command, *private, "--out", str(tmp_path / "private")]) == 0
    shown = capsys.readouterr().err
    assert "epoch 1/1" in shown
    assert "loss" not in shown


def test_no_augmented_copies_is_no_privacy_that_makes_sense(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "train",
        "--dp-noise-multiplier",
        "1",
        "--dp-delta",
        "1e-4",
        "--dp-fix",
        "--dp-augmentations",
        "0",
    ]
    assert run([*command, "--epochs", "1", "--out", str(tmp_path / "run")]) == 2
    assert "augmentations=0" in capsys.readouterr().err
