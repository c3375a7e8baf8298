"""Tiny models and data for tests of the main job; the linear one has outcomes that can be written down."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from robust import Classifier
from robust.attacks import Attack, Result, get
from robust.cost import Cost

DUAL = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}


class Subject(NamedTuple):
    """A model, its data, and per sample the smallest perturbation that breaks it (0 where it is wrong already)."""

    clf: Classifier
    x: Tensor
    y: Tensor
    radius: Tensor


def linear(
    norm: str = "linf", classes: int = 3, shape: tuple[int, int, int] = (1, 3, 4), n: int = 16, wrong: int = 2
) -> Subject:
    """A linear model on points far from the box's edges; the first `wrong` labels are wrong from the start."""
    generator = torch.Generator().manual_seed(classes + n)
    size = shape[0] * shape[1] * shape[2]
    module = nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
    with torch.no_grad():
        module[1].weight.copy_(torch.randn(classes, size, generator=generator))
        module[1].bias.copy_(-module[1].weight.sum(1) / 2)  # grey lies on every boundary
    x = 0.35 + 0.3 * torch.rand(n, *shape, generator=generator)
    logits = (x.flatten(1).double() @ module[1].weight.double().T + module[1].bias.double()).detach()
    y = logits.argmax(1)
    y[:wrong] = (y[:wrong] + 1) % classes
    weight = module[1].weight.detach().double()
    gap = logits.gather(1, y[:, None]) - logits
    slope = (weight[y][:, None] - weight[None]).norm(p=DUAL[norm], dim=2)
    radius = (gap / slope.clamp_min(1e-12)).scatter(1, y[:, None], torch.inf).amin(1).clamp_min(0)
    return Subject(Classifier(module.eval(), name="linear"), x, y, radius)


def between(radius: Tensor, share: float) -> float:
    """An eps that about the given share of the positive radii lies below, clearly apart from all of them."""
    ordered = radius[radius > 0].sort().values.tolist()
    gaps = [(low, high) for low, high in pairwise(ordered) if high > 1.05 * low]
    low, high = gaps[min(int(share * len(gaps)), len(gaps) - 1)]
    return (low + high) / 2


class Net(nn.Module):
    """A smooth two-layer network."""

    def __init__(self, classes: int, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(shape[0], 4, 3, padding=1)
        self.linear = nn.Linear(4 * shape[1] * shape[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.linear(torch.tanh(4 * self.conv(x)).flatten(1))
        return logits


def network(
    classes: int = 4, shape: tuple[int, int, int] = (1, 5, 6), n: int = 16, seed: int = 5
) -> tuple[Classifier, Tensor, Tensor]:
    """A nonlinear model on points of its own labels, one of them wrong on purpose."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module, x = Net(classes, shape).eval(), torch.rand(n, *shape)
    clf = Classifier(module, name="network")
    with torch.no_grad():
        y = module(x).argmax(1)
    y[0] = (y[0] + 1) % classes
    return clf, x, y


@dataclass(frozen=True, kw_only=True)
class Liar(Attack):
    """An attack that claims every sample: by its clean point, outside the ball, outside the box, and rightly."""

    def run(self, model: Any, x: Tensor, y: Tensor, **options: Any) -> Result:
        """Four kinds of claims in turn."""
        kind, step = torch.arange(len(x)) % 4, torch.zeros_like(x)
        found = get("apgd-t")(threat=self.threat, until="broken").run(model, x, y, **options).x_adv
        step[:, 0, 0, 0] = torch.tensor([0.0, 2 * self.threat.eps, -9.0, 0.0])[kind]
        claims = torch.where((kind == 3).view(-1, 1, 1, 1), found, torch.where(
            (kind == 1).view(-1, 1, 1, 1), found + step, x + step))  # fmt: skip
        success = torch.ones(len(x), dtype=torch.bool)
        return Result(claims, success, self.threat.distance(claims, x), Cost())
