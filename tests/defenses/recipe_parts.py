"""A tiny network in float64, for recipes against formulas that are written out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from robust.learner import Learner

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


class Exact(Learner):
    """A learner whose logits stay in float64."""

    def _forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.module(x)
        return logits


def batch(n: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, 1, 5, 5, generator=generator), torch.arange(n) % 3, torch.arange(n) + 50


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        layers = [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 3)]
        module = nn.Sequential(*layers).train()
        nn.init.normal_(module[4].weight, std=0.6)  # unsure of some, sure and wrong about others
    return module


def descent(module: nn.Module, value: Tensor) -> list[Tensor]:
    return [g.detach() for g in torch.autograd.grad(value, list(module.parameters()))]


def softmax(logits: Tensor) -> Tensor:
    return logits.exp() / logits.exp().sum(1, keepdim=True)
