"""Differential privacy in `robust train`: exact resume, a ledger that is never short, a budget kept, clear refusals."""

from __future__ import annotations

import json
import math
import secrets
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from scipy import stats
from torch import nn

from robust.augment import Augment
from robust.checkpoint import CHECKPOINT, WEIGHTS
from robust.defenses.privacy import epsilon, read_ledger
from robust.defenses.privacy.walk import Walk
from robust.defenses.training import get
from robust.errors import RobustError, RunError
from robust.fit import fit
from robust.privacy import LEDGER, Privacy
from robust.rng import derive
from tests.conftest import ROOT
from tests.contracts.recipe_subjects import digits
from tests.defenses.private_training_parts import (
    BATCH,
    BOUND,
    COUNT,
    STEPS,
    booked,
    module,
    private_fit,
)
from tests.robust.training_parts import same

BUDGET = 5.5
ZCDP = {"noise_multiplier": 1.0, "delta": 1e-4, "accountant": "zcdp"}


class Stopped(Exception):
    """An interruption."""


def stop(event: object) -> None:
    """Ends a training after its first step."""
    raise Stopped


def begun(folder: Path) -> Path:
    """A run folder that holds the secret of a training and none of its steps."""
    with pytest.raises(Stopped):
        private_fit(folder, progress=stop, checkpoint_seconds=100)
    (folder / LEDGER).unlink()
    return folder


# -- kill -9 and resume ----------------------------------------------------------------------------------------------


def test_killed_at_random_moments_it_ends_with_the_same_weights_and_the_same_ledger(tmp_path: Path) -> None:
    first = begun(tmp_path / "killed")
    whole = Path(shutil.copytree(first, tmp_path / "whole"))
    command = [sys.executable, "-m", "tests.defenses.private_training_parts", str(first), "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) >= 3
    assert len({entry["booked"] for entry in seen}) >= 3
    assert all(entry["booked"] >= entry["taken"] for entry in seen)
    killed, unbroken = private_fit(first, resume=True), private_fit(whole, resume=True)
    assert load_file(first / CHECKPOINT).keys() == load_file(whole / CHECKPOINT).keys()
    assert same(load_file(first / WEIGHTS), load_file(whole / WEIGHTS))
    assert read_ledger(first / LEDGER) == read_ledger(whole / LEDGER)
    assert booked(first) == STEPS
    for name in ("privacy", "training", "history"):
        assert killed.record[name] == unbroken.record[name]


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_step_is_on_disk_before_the_weights_move(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, moves = torch.optim.SGD.step, []

    def watched(self: torch.optim.SGD, closure: Any = None) -> None:
        moves.append(booked(tmp_path))
        if len(moves) == 4:
            if where == "after":
                step(self)
            raise Stopped
        step(self)

    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    with pytest.raises(Stopped):
        private_fit(tmp_path, checkpoint_seconds=100)
    assert moves == [1, 2, 3, 4]
    private_fit(tmp_path, resume=True)
    assert moves[4:] == [4, 4, 4, 4, *range(5, STEPS + 1)]


def test_in_secure_mode_the_steps_that_are_repeated_are_paid_for_again(tmp_path: Path) -> None:
    asked = {"secure_mode": True}
    with pytest.raises(Stopped):
        private_fit(tmp_path, privacy=asked, progress=stop, checkpoint_seconds=100)
    result = private_fit(tmp_path, privacy=asked, resume=True)
    assert booked(tmp_path) == result.record["privacy"]["steps"] == STEPS + 1


def test_the_seed_is_its_owners_alone_and_gone_at_the_end(tmp_path: Path) -> None:
    path = begun(tmp_path) / CHECKPOINT
    secret = int(load_file(path)["private/seed"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    result = private_fit(tmp_path, resume=True)
    assert "private/seed" not in load_file(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    written = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert str(secret).encode() not in written
    before = (tmp_path / LEDGER).read_bytes()
    again = private_fit(tmp_path, resume=True)  # a finished training has nothing left to do
    assert again.record["privacy"] == result.record["privacy"]
    assert (tmp_path / LEDGER).read_bytes() == before


def test_a_ledger_without_its_checkpoint_is_not_begun_anew(tmp_path: Path) -> None:
    private_fit(tmp_path, epochs=1)
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(RunError, match=r"has 5 steps booked, of a training whose checkpoint is gone"):
        private_fit(tmp_path, resume=True)
    assert not (tmp_path / CHECKPOINT).exists()


def test_a_training_is_not_resumed_with_other_noise(tmp_path: Path) -> None:
    begun(tmp_path)
    with pytest.raises(RunError, match="belongs to a training with privacy="):
        private_fit(tmp_path, resume=True, privacy={"noise_multiplier": 0.9})


# -- the budget -----------------------------------------------------------------------------------------------------


def test_the_noise_that_is_found_keeps_the_budget_and_wastes_little_of_it(tmp_path: Path) -> None:
    asked = {"epsilon": 3.0, "noise_multiplier": None, "accountant": "pld"}
    result = private_fit(tmp_path, privacy=asked)
    told = result.record["privacy"]
    cost = epsilon(
        noise_multiplier=told["noise_multiplier"], sample_rate=BATCH / COUNT, steps=STEPS, delta=1e-4
    )
    assert 2.95 < told["epsilon"] == cost <= 3.0
    assert (told["steps"], told["guaranteed"], result.record["warnings"]) == (STEPS, True, [])
    assert told["neighbours"] == "one record added or removed"
    assert told["sampling"].startswith("Poisson")
    assert json.loads((tmp_path / "train.json").read_text())["privacy"] == told


@pytest.mark.parametrize("folder", [True, False])
def test_a_training_stops_before_its_budget_is_exceeded(folder: bool, tmp_path: Path) -> None:
    out = tmp_path if folder else None
    result = private_fit(out, privacy={"epsilon": BUDGET, "accountant": "rdp"})
    told = result.record["privacy"]
    steps = {"noise_multiplier": 1.0, "sample_rate": BATCH / COUNT, "delta": 1e-4, "accountant": "rdp"}
    assert 0 < told["steps"] < STEPS
    assert told["epsilon"] == epsilon(steps=told["steps"], **steps) <= BUDGET
    assert epsilon(steps=told["steps"] + 1, **steps) > BUDGET
    assert result.record["warnings"] == [
        f"stopped after {told['steps']} of {STEPS} steps: the next one would exceed the privacy budget"
    ]
    if folder:
        assert booked(tmp_path) == told["steps"]
        again = private_fit(out, privacy={"epsilon": BUDGET, "accountant": "rdp"}, resume=True)
        assert again.record["privacy"] == told


@pytest.mark.parametrize(
    ("asked", "line"),
    [
        ({"noise_multiplier": None}, "lacks its measure"),
        ({"delta": None}, "lacks its delta"),
        ({"delta": 0.02}, "must be well below 1/60"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"epsilon": -1.0}, "epsilon=-1"),
        ({"epsilon": 0.1, "noise_multiplier": 0.4}, "not even one step"),
        ({"epsilon": 3.0, "accountant": "gdp"}, "may understate"),
        ({"accountant": "zcpd"}, "did you mean zcdp"),
        ({"clipping": "flatt"}, "clipping=flatt"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0"),
        ({"augmentations": 0}, "augmentations=0"),
    ],
)
def test_a_privacy_that_makes_no_sense_is_one_line(asked: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(RobustError, match=line):
        private_fit(tmp_path / "run", privacy=asked)
    assert not (tmp_path / "run").exists()


# -- the noise and the gradients ------------------------------------------------------------------------------------


def test_weights_get_noise_of_the_right_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step with and without noise, on the same samples: the difference is N(0, (lr · sigma · C / batch)²)."""
    monkeypatch.setattr(secrets, "randbits", lambda bits: 77)
    options: dict[str, Any] = {"epochs": 1, "batch_size": COUNT, "momentum": 0.0, "ema": None, "lr": 1.0}
    options["schedule"] = "constant"
    ends = [private_fit(privacy={"noise_multiplier": z}, **options) for z in (2.0, 0.0)]
    noisy, plain = (torch.cat([p.flatten() for p in end.classifier.module.parameters()]) for end in ends)
    found = (noisy - plain).detach().double().numpy()
    scale = 2.0 * BOUND / COUNT
    assert len(found) > 1000
    assert stats.kstest(found / scale, "norm").pvalue > 0.01
    for wrong in (2 / 3, 3 / 2):
        assert stats.kstest(found / (wrong * scale), "norm").pvalue < 1e-6
    assert ends[1].record["privacy"]["epsilon"] is None


def test_the_noise_is_another_one_in_every_training() -> None:
    first, second = (private_fit(epochs=1).classifier.module.state_dict() for _ in range(2))
    assert not same(first, second)


def test_copies_of_a_sample_are_averaged_before_they_are_clipped() -> None:
    """A step on all samples, against single samples in float64."""
    (x, y), augment = digits(20), Augment(crop=2, flip=True)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    exact = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()
    exact.load_state_dict(net.state_dict())
    step = derive(derive(0, "epoch", 0), "step", 0)
    total = [torch.zeros_like(p) for p in exact.parameters()]
    for i in range(20):
        index = torch.tensor([i])
        keys = [derive(step, "copy", copy) for copy in (0, 1)]
        views = torch.cat([augment(x[index], index, key) for key in keys]).double()
        loss = nn.functional.cross_entropy(exact(views), y[index].expand(2))
        gradient = torch.autograd.grad(loss, list(exact.parameters()))
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient))
        for so_far, g in zip(total, gradient, strict=True):
            so_far += g * min(1.0, 0.3 / norm)
    before = [p.detach().clone() for p in net.parameters()]
    asked = Privacy(noise_multiplier=0.0, delta=1e-4, max_grad_norm=0.3, augmentations=2)
    fit(net, (x, y), loss=get("standard")(), augment=augment, epochs=1, batch_size=20, lr=1.0, optimizer="sgd",
        momentum=0.0, schedule="constant", accumulate=3, privacy=asked)  # fmt: skip
    for p, start, so_far in zip(net.parameters(), before, total, strict=True):
        torch.testing.assert_close(start - p.detach(), (so_far / 20).float(), rtol=1e-4, atol=1e-6)


def test_a_sample_whose_loss_is_no_number_adds_nothing_and_stops_nothing() -> None:
    x, y = digits(20)

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scale = torch.where(x.flatten(1).sum(1) == 0, torch.inf, 1.0)
            return self.layer(x.flatten(1)) * scale[:, None]  # type: ignore[no-any-return]

    losses: list[float] = []
    x, y = torch.cat([x, torch.zeros_like(x[:1])]), torch.cat([y, y[:1]])
    net = Broken()
    before = net.layer.weight.detach().clone()
    fit(net, (x, y), loss=get("standard")(), epochs=3, batch_size=20, progress=lambda event: losses.append(event.loss),
        privacy=Privacy(noise_multiplier=0.0, delta=1e-4))  # fmt: skip
    assert any(not math.isfinite(loss) for loss in losses)
    assert bool(net.layer.weight.isfinite().all())
    assert not torch.equal(net.layer.weight, before)


def test_the_model_is_left_as_it_was_found() -> None:
    net = module().eval()
    fit(net, digits(COUNT), loss=get("standard")(), epochs=1, batch_size=BATCH, privacy=Privacy(**ZCDP))
    assert not any("forward" in part.__dict__ for part in net.modules())
    assert not any(part.training for part in net.modules())


def test_samples_are_drawn_by_coins_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, rows = [], Walk.rows

    def noted(self: Walk, step: int) -> torch.Tensor:
        found = rows(self, step)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(Walk, "rows", noted)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    fit(net, digits(50), loss=get("standard")(), epochs=4, batch_size=1, privacy=Privacy(**ZCDP))
    assert len(sizes) == 200
    assert 0 in sizes  # an empty batch is a step on noise alone
    assert stats.binomtest(sum(sizes), 200 * 50, 1 / 50).pvalue > 1e-3
