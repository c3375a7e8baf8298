"""The directions of the transfer attacks against their papers' formulas, written out naively."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks import get
from robust.attacks.query import Answer
from robust.attacks.rule import State
from robust.attacks.trial import Trial
from robust.attacks.whitebox.transfer import TransferSteps
from robust.attacks.whitebox.vmifgsm import VarianceSteps
from robust.classifier import Classifier
from robust.threat import Linf
from tests.contracts.subjects import small

EPS, STEPS = 0.05, 4
Record = tuple[State, State, Tensor]
Objective = Callable[[Tensor], Tensor]


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What a rule knew before and after each step, and where it took gradients."""
    kept: list[Record] = []
    step = TransferSteps.step

    def recording(self: TransferSteps, state: State, answer: Answer) -> State:
        changed = step(self, state, answer)
        if answer.gradient is not None:
            kept.append((dict(state), changed, self.points(state)))
        return changed

    monkeypatch.setattr(TransferSteps, "step", recording)
    return kept


def gradient(objective: Objective, at: Tensor) -> Tensor:
    """∇ objective by autograd."""
    leaf = at.detach().clone().requires_grad_(True)
    (found,) = torch.autograd.grad(objective(leaf), leaf)
    return found


def lookahead(state: State) -> Tensor:
    """x + α μ g with g in units of mean magnitude, α = eps / steps and μ = 1."""
    ahead: Tensor = state["at"] + EPS / STEPS * state["momentum"] * state["x"][0].numel()
    return ahead.clamp(0, 1)


def nesterov(objective: Objective, state: State, points: Tensor) -> Tensor:
    return gradient(objective, lookahead(state))


def scaled(objective: Objective, state: State, points: Tensor) -> Tensor:
    ahead = lookahead(state)
    return sum((gradient(lambda z: objective(z / 2**i), ahead) for i in range(3)), torch.zeros(())) / 3  # noqa: B023


def tuned(objective: Objective, state: State, points: Tensor) -> Tensor:
    return gradient(objective, state["at"]) + state["variance"]


def tuned_ahead(objective: Objective, state: State, points: Tensor) -> Tensor:
    return gradient(objective, lookahead(state)) + state["variance"]


def smoothed(objective: Objective, state: State, points: Tensor) -> Tensor:
    line = torch.tensor([0.25, 0.5, 0.25])  # linear, k = 1
    kernel = torch.outer(line, line)[None, None]
    return F.conv2d(gradient(objective, state["at"]), kernel, padding=1)


@pytest.mark.parametrize(
    ("name", "fields", "formula"),
    [
        ("nifgsm", {}, nesterov),
        ("sinifgsm", {"scales": 3}, scaled),
        ("vmifgsm", {"neighbours": 2}, tuned),
        ("vnifgsm", {"neighbours": 2}, tuned_ahead),
        ("tifgsm", {"kernel": "linear", "kernel_size": 3}, smoothed),
    ],
)
@pytest.mark.parametrize("targeted", [False, True])
def test_direction_is_the_papers(
    name: str, fields: dict[str, Any], formula: Any, targeted: bool, records: list[Record]
) -> None:
    clf, x, y = small()
    attack = get(name)(threat=Linf(EPS), steps=STEPS, **fields)
    attack(clf, x, y, targets=(y + 2) % 5 if targeted else None, precision="original")
    taken = [record for record in records if bool((record[0]["t"] < STEPS).all())]
    assert len(taken) == STEPS
    for state, changed, points in taken:
        found = formula(aim(clf, state, targeted), state, points)
        wanted = state["momentum"] + found / found.abs().sum((1, 2, 3), keepdim=True)
        assert torch.allclose(changed["momentum"], wanted, atol=1e-5)


def aim(clf: Classifier, state: State, targeted: bool) -> Objective:
    """What the attack raises, summed over rows."""
    goal, sign = (state["target"], -1) if targeted else (state["y"], 1)
    return lambda z: sign * F.cross_entropy(clf(z), goal, reduction="sum")


@pytest.mark.parametrize("name", ["vmifgsm", "vnifgsm"])
def test_variance_is_the_neighbours_mean_gradient_less_the_points_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clf, x, y = small()
    seen, step = [], VarianceSteps.step

    def recording(self: Any, state: State, answer: Answer) -> State:
        changed: State = step(self, state, answer)
        if "variance" in changed:
            seen.append((dict(state), changed["variance"], self.points(state)))
        return changed

    monkeypatch.setattr(VarianceSteps, "step", recording)
    get(name)(threat=Linf(EPS), steps=STEPS, neighbours=2, beta=0.5)(clf, x, y, precision="original")
    assert len(seen) >= STEPS
    for state, variance, points in seen:
        first, *around = points.unflatten(0, (-1, 3)).unbind(1)
        own, *others = (gradient(aim(clf, state, False), at) for at in (first, *around))
        assert torch.allclose(variance, torch.stack(others).mean(0) - own, atol=1e-5)
        reach = torch.stack(around) - state["at"]
        assert 0.4 * EPS < float(reach.abs().max()) <= 0.5 * EPS + 1e-6


def test_diverse_inputs_pull_the_gradient_back_through_their_transformation(records: list[Record]) -> None:
    clf, x, y = small()
    attack = get("difgsm")(threat=Linf(EPS), steps=STEPS, decay=1.0, resize_rate=0.5, diversity=0.7)
    rule = attack.rule(Trial(attack, clf, x, y))
    attack(clf, x, y, precision="original")
    moved = 0
    for state, changed, points in records:
        moved += int((points != state["at"]).flatten(1).any(1).sum())
        found = gradient(lambda z: aim(clf, state, False)(rule._transform(z, state)), state["at"])  # noqa: B023
        wanted = state["momentum"] + found / found.abs().sum((1, 2, 3), keepdim=True)
        assert torch.allclose(changed["momentum"], wanted, atol=1e-5)
    rows = sum(len(state["at"]) for state, _, _ in records)
    assert 0.5 < moved / rows < 0.9, "seven in ten are transformed"


@pytest.mark.parametrize(
    ("name", "fields", "plain"),
    [
        ("sinifgsm", {"scales": 1}, "nifgsm"),
        ("tifgsm", {"kernel_size": 1}, "mifgsm"),
        ("difgsm", {"diversity": 0.0, "decay": 1.0}, "mifgsm"),
        ("nifgsm", {"decay": 0.0}, "difgsm"),
    ],
)
def test_without_its_idea_a_method_is_the_one_it_extends(
    name: str, fields: dict[str, Any], plain: str
) -> None:
    clf, x, y = small()
    base = {"diversity": 0.0} if plain == "difgsm" else {}
    one = get(name)(threat=Linf(EPS), **fields)(clf, x, y)
    other = get(plain)(threat=Linf(EPS), **base)(clf, x, y)
    assert torch.allclose(one, other, atol=1e-6)
