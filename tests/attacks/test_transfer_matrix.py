"""Claims about the transfer matrix: who is counted, what is compared, and how sure it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from robust.attacks.transfer.figure import heat_map
from robust.attacks.transfer.matrix import OTHERS, Cell, TransferTable, mcnemar, transfer_matrix, wilson
from robust.classifier import Classifier
from robust.errors import ModelError, RobustError
from robust.threat import Linf


def split(half: int, gain: float = 1.0, name: str = "split") -> Classifier:
    """Two classes by the sign of the sum, around grey, of one half of the image: left (0) or right (1)."""
    layer = nn.Linear(8, 2)
    weight = torch.zeros(2, 2, 4)
    weight[1, :, 2 * half : 2 * half + 2] = gain
    with torch.no_grad():
        layer.weight.copy_(weight.flatten(1))
        layer.bias.copy_(torch.tensor([0.0, -gain * 2]))
    return Classifier(nn.Sequential(nn.Flatten(), layer).eval(), name=name)


def images() -> tuple[Tensor, Tensor]:
    """Images whose halves agree about the class, at 0.01, 0.02, … from the boundary."""
    far = torch.arange(1, 21) / 100
    y = torch.arange(20) % 2
    x = 0.5 + torch.where(y > 0, far, -far)
    return x.view(-1, 1, 1, 1).expand(20, 1, 2, 4).clone(), y


def test_points_transfer_to_what_looks_at_the_same_pixels_and_to_nothing_else() -> None:
    x, y = images()
    models = {"left": split(0), "same": split(0, 3.0), "right": split(1)}
    table = transfer_matrix(models, x, y, Linf(0.105), ("bim", "mifgsm"))
    for attack in ("bim", "mifgsm"):
        assert table.cell("left", "left", attack).fooled == 10, "those within eps of the boundary"
        assert table.cell("left", "same", attack).fooled == 10
        assert table.cell("left", "right", attack).fooled == 0
        assert table.cell("right", "same", attack).fooled == 0
    assert all(cell.n == 20 for cell in table.cells)
    assert len(table.cells) == 2 * 9


def test_counted_is_what_source_and_target_both_classify_correctly() -> None:
    x, y = images()
    x[:4, ..., 2:] = 1 - x[:4, ..., 2:]  # the right half of four images says the other class
    models = {"left": split(0), "right": split(1)}
    table = transfer_matrix(models, x, y, Linf(0.105), ("pgd",))
    assert table.cell("left", "left", "pgd").n == 20
    assert {
        table.cell(*pair, "pgd").n for pair in (("left", "right"), ("right", "left"), ("right", "right"))
    } == {16}
    assert [model["accuracy"] for model in table.models] == [1.0, 0.8]


def test_each_attack_is_paired_with_the_first_on_the_same_samples() -> None:
    x, y = images()
    attacks: dict[str, dict[str, Any]] = {
        "weak": {"attack": "pgd", "step_size": 1e-6, "random_start": False},
        "pgd": {},
    }
    table = transfer_matrix({"a": split(0), "b": split(0, 2.0)}, x, y, Linf(0.105), attacks)
    weak, strong = (table.cell("a", "b", name) for name in attacks)
    assert (weak.fooled, strong.fooled, strong.gained, strong.lost) == (0, 10, 10, 0)
    assert strong.gain == 0.5
    assert strong.gain_error == pytest.approx(1.96 * (0.25 / 20) ** 0.5, rel=1e-3)
    assert strong.p == pytest.approx(2 * 0.5**10)
    assert weak.p == 1
    assert table.attacks["weak"]["step_size"] == 1e-6


def test_all_others_fused_are_a_source_for_each_target() -> None:
    x, y = images()
    models = {"left": split(0), "copy": split(0, 2.0), "right": split(1)}
    table = transfer_matrix(models, x, y, Linf(0.105), ("bim",), sources=["right"], fused="logits")
    assert table.sources == ("right", OTHERS)
    assert table.cell(OTHERS, "left", "bim").fooled >= 10, "its copy is among the others"
    assert table.cell(OTHERS, "right", "bim").fooled == 0
    assert len(table.cells) == 3 + 3


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (450, 900)])
def test_wilson_s_interval_is_scipy_s(successes: int, n: int) -> None:
    theirs = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)
    assert wilson(0, 0) == (0.0, 1.0)


def test_mcnemar_s_test_is_the_binomial_one_on_what_changed() -> None:
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1


def test_a_table_survives_json_and_its_picture_is_the_same_bytes() -> None:
    import json

    x, y = images()
    table = transfer_matrix({"left": split(0), "right": split(1)}, x, 1 - y, Linf(0.1), ("pgd", "mifgsm"))
    assert all(cell.n == 0 for cell in table.cells), "nothing is classified correctly"
    again = TransferTable.from_dict(json.loads(json.dumps(table.to_dict(), allow_nan=False)))
    assert again.cells == table.cells
    cells = tuple(Cell(c.source, c.target, c.attack, 20, 7, 3, 1) for c in table.cells)
    full = TransferTable.from_dict({**table.to_dict(), "cells": [cell.to_dict() for cell in cells]})
    assert heat_map(full) == heat_map(full)
    assert heat_map(full).startswith(b"<?xml")
    assert heat_map(table) != heat_map(full)


@pytest.mark.parametrize(
    ("change", "kind", "line"),
    [
        ({"attacks": ("square",)}, RobustError, "square cannot be transferred"),
        ({"attacks": ()}, RobustError, "at least one attack"),
        ({"models": {}}, RobustError, "at least one model"),
        ({"models": {"others": split(0)}}, RobustError, "may be called 'others'"),
        ({"sources": ["lft"]}, RobustError, "source 'lft' is none of the models left"),
        ({"fused": "logits"}, RobustError, "nothing to fuse"),
        (
            {"models": {"a": split(0), "b": Classifier(split(0).module, bounds=(0, 2))}},
            ModelError,
            "give one box",
        ),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    change: dict[str, Any], kind: type[Exception], line: str
) -> None:
    x, y = images()
    call: dict[str, Any] = {"models": {"left": split(0)}, "attacks": ("pgd",), **change}
    models, attacks = call.pop("models"), call.pop("attacks")
    with pytest.raises(kind, match=line):
        transfer_matrix(models, x, y, Linf(0.1), attacks, **call)
