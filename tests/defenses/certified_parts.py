"""Small networks whose certificates are known or can be attacked."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robust.classifier import Classifier


def hyperplane(classes: int = 2) -> tuple[Classifier, Tensor, Tensor, Tensor]:
    """A linear classifier with a normalisation: clf, x, and its logits' slope (K, D) and offset in x."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Linear(12, classes)
        x = torch.rand(10, 3, 2, 2)
    clf = Classifier(nn.Sequential(nn.Flatten(), layer).eval(), mean=0.4, std=0.5)
    slope = layer.weight.detach().double() / 0.5
    offset = layer.bias.detach().double() - slope.sum(1) * 0.4
    return clf, x, slope, offset


def distances(x: Tensor, slope: Tensor, offset: Tensor, dual: float) -> tuple[Tensor, Tensor]:
    """Classes, and the exact distance to the nearest other class: the gap over the dual norm."""
    logits = x.double().flatten(1) @ slope.T + offset
    y = logits.argmax(1)
    gap = logits.gather(1, y[:, None]) - logits
    steep = (slope[y][:, None] - slope[None]).norm(p=dual, dim=2).clamp_min(1e-12)
    return y, (gap / steep).scatter(1, y[:, None], torch.inf).amin(1)


class Residual(nn.Module):
    """Convolutions with batch norm, a residual sum, overlapping and average pooling, in functions and modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.before = nn.BatchNorm2d(4)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        hidden = torch.relu(self.norm(self.first(x)))
        hidden = hidden + self.second(nn.functional.relu(self.before(hidden)))
        hidden = nn.functional.avg_pool2d(self.pool(hidden), 2)
        logits: Tensor = self.last(hidden.view(hidden.size(0), -1))
        return logits


def networks() -> dict[str, tuple[Classifier, Tensor]]:
    """Small networks with points: fully connected, convolutional, residual."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        dense = nn.Sequential(
            nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
        )
        conv = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(4, 3),
        )
        residual = Residual()
        residual.norm.running_mean = torch.randn(4) * 0.1
        residual.before.running_var = torch.rand(4) + 0.5
        points = {
            "dense": torch.rand(6, 2, 2, 2),
            "conv": torch.rand(6, 2, 4, 4),
            "residual": torch.rand(6, 2, 4, 4),
        }
    modules = {"dense": dense, "conv": conv, "residual": residual}
    return {
        name: (Classifier(module.eval(), mean=0.5, std=0.25, name=name), points[name])
        for name, module in modules.items()
    }
