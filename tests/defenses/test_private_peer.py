"""Opacus's engine behind ours: layers that have no rule here, and agreement where both have one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust.defenses.privacy import fix, make_private
from robust.errors import ModelError
from tests.defenses.privacy_parts import clipped_sum, distance, gradients, losses

pytest.importorskip("opacus", reason="opacus is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # opacus's hooks and its own imports warn

PLAIN: Any = {"noise_multiplier": 0, "expected_batch_size": 1}


class Reader(nn.Module):
    """A recurrent layer and the linear one on its last state."""

    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.memory = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 3) to (B, 2)."""
        found: Tensor = self.head(self.memory(x)[0][:, -1])
        return found


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.Conv2d])
def test_opacus_serves_layers_without_a_rule(kind: Any) -> None:
    torch.manual_seed(0)
    if kind is not nn.Conv2d:
        plain, x = Reader(kind), torch.randn(5, 5, 3)
    else:
        plain = nn.Sequential(nn.Conv2d(2, 3, 2), nn.GroupNorm(3, 3), nn.Flatten(), nn.Linear(12, 2))  # type: ignore[assignment]
        x = torch.randn(5, 2, 3, 3)
    model = fix(plain)
    expected = clipped_sum(copy.deepcopy(model), x, 1.0)
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    private, optimizer, _ = make_private(model, sgd, None, engine="opacus", **PLAIN)
    for _ in range(2):
        optimizer.zero_grad()
        losses(private(x)).mean().backward()
    optimizer.step()
    assert distance(gradients(private), expected) < 1e-5
    out = private(x[:0])
    out.sum().backward()
    optimizer.step()
    assert all(float(g.norm()) == 0 for g in gradients(private))


def test_what_opacus_refuses_is_refused_in_one_line() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    sgd = torch.optim.SGD(model.parameters(), 1.0)
    with pytest.raises(ModelError, match="BatchNorm"):
        make_private(model, sgd, None, engine="opacus", **PLAIN)
