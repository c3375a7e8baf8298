"""What must not undo differential privacy: errors on the way, folders, models, files and losses that are others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from robust.checkpoint import CHECKPOINT
from robust.errors import ModelError, RunError
from robust.fit import fit
from robust.losses import cross_entropy
from robust.privacy import LEDGER, Privacy
from tests.contracts.recipe_subjects import digits
from tests.defenses.private_training_parts import BATCH, COUNT, booked, module, private_fit
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
