"""Small models with known answers, and every registered attack at a size that a test can afford."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from robust.attacks import REGISTRY, Attack, get
from robust.classifier import Classifier
from robust.threat import Patch, Threat, make_threat

# What makes an attack short; only fields that it has are set.
SHORT: dict[str, Any] = {"steps": 10, "queries": 100, "n_targets": 3}
RADII = {"linf": 0.06, "l2": 0.5, "l1": 3.0, "l0": 6.0, "patch": 1.0}


def make(name: str, norm: str, eps: float | Tensor | None = None, **fields: Any) -> Attack:
    """An attack by name at a test's size."""
    kind = get(name)
    short = {key: value for key, value in SHORT.items() if key in kind.__dataclass_fields__}
    if kind.knowledge == "transfer":
        short |= {"inner": "mifgsm,difgsm", "epochs": 15}
    if kind.universal:
        short["steps"] = 40  # of all samples at once
    if "version" in kind.__dataclass_fields__:
        short["version"] = "quick"
    radius = (1.0 if kind.semantic else RADII[norm]) if eps is None else eps
    threat = Patch(height=4, width=5) if norm == "patch" else make_threat(norm, radius)
    attack: Attack = kind(threat=threat, **{**short, **fields})
    return attack


def cases() -> list[tuple[str, str]]:
    """Every registered attack in every norm that it has; in patches those that know nothing else."""
    return [
        (name, norm)
        for name in REGISTRY
        for norm in get(name).norms
        if norm != "patch" or get(name).norms == ("patch",)
    ]


class SmallNet(nn.Module):
    """A smooth two-layer network on (1, 6, 7) images."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.linear = nn.Linear(6 * 6 * 7, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.linear(torch.tanh(self.conv(x)).flatten(1))
        return logits


def small(classes: int = 5, n: int = 12) -> tuple[Classifier, Tensor, Tensor]:
    """A classifier with points of its own labels, one of them wrong on purpose."""
    torch.manual_seed(5)
    clf = Classifier(SmallNet(classes).eval())
    x = torch.rand(n, 1, 6, 7)
    y = clf.logits(x).argmax(1)
    y[0] = (y[0] + 1) % classes
    return clf, x, y


def linear(classes: int = 6, n: int = 16) -> tuple[Classifier, Tensor, Tensor, Tensor, Tensor]:
    """A linear model on points far from the box's edges: clf, x, y, and its weight and bias."""
    torch.manual_seed(3)
    layer = nn.Linear(3 * 5 * 5, classes)
    clf = Classifier(nn.Sequential(nn.Flatten(), layer).eval(), bounds=(-4.0, 5.0))
    x = torch.rand(n, 3, 5, 5)
    y = clf.logits(x).argmax(1)
    return clf, x, y, layer.weight.detach(), layer.bias.detach()


def optimum(clf: Classifier, x: Tensor, y: Tensor, weight: Tensor, norm: str) -> Tensor:
    """(N,) the closed-form smallest perturbation of a linear model: the gap over the dual norm, nearest class."""
    dual = {"linf": 1.0, "l2": 2.0, "l1": float("inf")}[norm]
    logits = clf.logits(x).double()
    gap = logits.gather(1, y[:, None]) - logits
    slope = (weight[y][:, None] - weight[None]).double().norm(p=dual, dim=2)
    return (gap / slope.clamp_min(1e-12)).scatter(1, y[:, None], torch.inf).amin(1)


def with_eps(threat: Threat, eps: Tensor) -> Threat:
    """A threat with one radius per sample."""
    return replace(threat, eps=eps)
