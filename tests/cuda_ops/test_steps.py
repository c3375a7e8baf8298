"""The attacks' steps: bit for bit what threats and rules compute, and what they promise at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robust import cuda_ops
from robust.cuda_ops.cases_attacks import CASES, STEPS
from robust.cuda_ops.dispatch import BackendError
from robust.threat import make_threat
from tests.cuda_ops.attack_inputs import CPU

NORMS = ("linf", "l2", "l1")
BOX = (0.0, 1.0)
SHAPE = (7, 3, 5, 11)


def column(values: Tensor) -> Tensor:
    """(B,) beside images."""
    return values.view(-1, 1, 1, 1)


def images(name: str, seed: int = 1) -> dict[str, Any]:
    """A case's inputs as images, with gradients of very different sizes and one without any."""
    made = CASES[name].make(SHAPE[0], SHAPE[1] * SHAPE[2] * SHAPE[3], seed, CPU)
    given = {k: v.view(SHAPE) if isinstance(v, Tensor) and v.dim() == 2 else v for k, v in made.items()}
    given["gradient"] = given["gradient"] * column(torch.logspace(-28, 12, SHAPE[0]))
    given["gradient"][0] = 0
    return given


def walked(norm: str, given: dict[str, Any], at: Tensor) -> Tensor:
    """The step as `robust.threat` has it, without its last shrinking of what rounding pushed out."""
    threat = make_threat(norm, given["eps"])
    keep = {"keep": given["keep"]} if norm == "l1" else {}
    return threat._project(
        at + column(given["size"]) * threat.steepest(given["gradient"], **keep), given["x"], BOX
    )


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_is_the_threat_s_bit_for_bit(norm: str) -> None:
    given = images(f"step_{norm}")
    assert torch.equal(CASES[f"step_{norm}"].operation(**given), walked(norm, given, given["at"]))


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_s_step_is_the_rule_s_bit_for_bit(norm: str) -> None:
    given = images(f"apgd_{norm}")
    origin, alpha = given["origin"], column(given["alpha"])
    moved = walked(norm, given, origin)
    mixed = origin + alpha * (moved - origin) + (1 - alpha) * (origin - given["before"])
    expected = make_threat(norm, given["eps"])._project(mixed, given["x"], BOX)
    assert torch.equal(CASES[f"apgd_{norm}"].operation(**given), expected)


def test_momentum_is_the_rule_s_bit_for_bit() -> None:
    given = images("momentum")
    gradient, velocity = given["gradient"], given["velocity"]
    size = gradient.flatten(1).abs().sum(1).clamp_min(1e-30)
    assert torch.equal(cuda_ops.momentum(**given), given["decay"] * velocity + gradient / column(size))


@pytest.mark.parametrize("name", [*STEPS, "momentum"])
def test_the_inputs_stay_as_they_are(name: str) -> None:
    given = images(name)
    before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
    found = CASES[name].operation(**given)
    assert all(torch.equal(given[key], value) for key, value in before.items())
    assert all(found.data_ptr() != given[key].data_ptr() for key in before)


@pytest.mark.parametrize("name", [*STEPS, "momentum"])
def test_no_gradient_flows_through_a_step(name: str) -> None:
    given = images(name)
    given["gradient"].requires_grad_()
    assert not CASES[name].operation(**given).requires_grad


@pytest.mark.parametrize("name", STEPS)
def test_a_step_stays_in_ball_and_box(name: str) -> None:
    given = images(name)
    given["size"] = 5 * given["eps"]
    found = CASES[name].operation(**given)
    threat = make_threat(name.partition("_")[2], given["eps"])
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert bool((threat.distance(found, given["x"]) <= given["eps"] * (1 + 1e-5)).all())


@pytest.mark.parametrize("norm", NORMS)
def test_only_rows_of_the_mask_move(norm: str) -> None:
    given, operation = images(f"step_{norm}"), CASES[f"step_{norm}"].operation
    mask = torch.tensor([True, False, True, True, False, False, True])
    found, free = operation(**given, mask=mask), operation(**given)
    assert torch.equal(found[mask], free[mask])
    assert torch.equal(found[~mask], given["at"][~mask])
    assert not torch.equal(free[~mask], given["at"][~mask])


@pytest.mark.parametrize("name", [*STEPS, "momentum"])
def test_nan_in_a_gradient_counts_as_zero(name: str) -> None:
    given = images(name)
    given["gradient"][2, 0, :3] = 0
    expected = CASES[name].operation(**given)
    given["gradient"][2, 0, :3] = torch.nan
    assert torch.equal(CASES[name].operation(**given), expected)


@pytest.mark.parametrize("name", ["step_l2", "apgd_l2", "momentum"])
def test_an_infinite_gradient_counts_as_zero_where_it_has_no_direction(name: str) -> None:
    given = images(name)
    given["gradient"][2, 0, 0, :2] = 0
    expected = CASES[name].operation(**given)
    given["gradient"][2, 0, 0, :2] = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(CASES[name].operation(**given), expected)


@pytest.mark.parametrize("norm", NORMS)
def test_no_gradient_is_no_step(norm: str) -> None:
    given = images(f"step_{norm}")
    given["gradient"] = torch.zeros(SHAPE)
    found = CASES[f"step_{norm}"].operation(**given)
    torch.testing.assert_close(found, given["at"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_an_infinite_radius_leaves_the_box(norm: str) -> None:
    given = images(f"step_{norm}") | {
        "eps": torch.full((SHAPE[0],), torch.inf),
        "size": torch.full((7,), 1e3),
    }
    threat = make_threat(norm, 1.0)
    keep = {"keep": given["keep"]} if norm == "l1" else {}
    expected = (given["at"] + 1e3 * threat.steepest(given["gradient"], **keep)).clamp(*BOX)
    torch.testing.assert_close(CASES[f"step_{norm}"].operation(**given), expected, rtol=0, atol=1e-4)


def test_the_l1_step_takes_the_largest_and_what_equals_the_last() -> None:
    x, one = torch.full((3, 6), 0.5), torch.ones(3)
    gradient = torch.tensor([[3.0, -2, 2, 1, 0, 0]]).repeat(3, 1)
    keep = torch.tensor([0.0, 2.5 / 6, 1.0])
    found = cuda_ops.step_l1(x, gradient, x, 0.12 * one, one, *BOX, keep) - x
    expected = torch.tensor(
        [[0.12, 0, 0, 0, 0, 0], [0.04, -0.04, 0.04, 0, 0, 0], [0.03, -0.03, 0.03, 0.03, 0, 0]]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [*STEPS, "momentum"])
def test_layouts_and_batches_without_rows_pass(name: str) -> None:
    given = images(name)
    expected = CASES[name].operation(**given)
    last = {
        k: v.to(memory_format=torch.channels_last) if isinstance(v, Tensor) and v.dim() == 4 else v
        for k, v in given.items()
    }
    torch.testing.assert_close(CASES[name].operation(**last), expected, rtol=0, atol=1e-6)
    none = {key: value[:0] if isinstance(value, Tensor) else value for key, value in given.items()}
    assert CASES[name].operation(**none).shape == (0, *SHAPE[1:])


@pytest.mark.parametrize("name", CASES)
def test_a_forced_kernel_that_cannot_run_here_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = CASES[name].make(2, 5, 1, CPU)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for forced in CASES[name].backends:
        monkeypatch.setenv("ROBUST_OPS", forced)
        with pytest.raises(BackendError, match=f"ROBUST_OPS={forced}"):
            CASES[name].operation(**arguments)


def test_a_case_counts_the_bytes_that_have_to_move() -> None:
    moved = {name: case.moved(case.make(10, 100, 1, CPU)) for name, case in CASES.items()}
    assert moved["step_linf"] == 4 * (4 * 1000 + 2 * 10)
    assert moved["apgd_l1"] == 4 * (5 * 1000 + 4 * 10)
    assert moved["momentum"] == 4 * 3 * 1000
    assert moved["loss cross-entropy"] == 4 * (2 * 1000 + 10) + 8 * 10
    assert moved["loss kl"] == 4 * (3 * 1000 + 10)
    assert moved["loss combined-targeted"] == 4 * (1000 + 3 * 10) + 2 * 8 * 10
