"""Small networks for private training: tanh bounds activations, and nothing mixes samples (arXiv:2007.14191)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TanhMnist(nn.Module):
    """Two convolutions (16, 32) and 32 hidden units, with tanh (Papernot et al. 2021, arXiv:2007.14191, table 1).

    Args:
        classes: number of outputs.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 8, stride=2, padding=3)
        self.conv2 = nn.Conv2d(16, 32, 4, stride=2)
        self.linear1 = nn.Linear(32 * 4 * 4, 32)
        self.linear2 = nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) to logits (N, classes)."""
        out = F.max_pool2d(torch.tanh(self.conv1(x)), 2, 1)
        out = F.max_pool2d(torch.tanh(self.conv2(out)), 2, 1)
        logits: Tensor = self.linear2(torch.tanh(self.linear1(out.flatten(1))))
        return logits


class TanhCifar(nn.Module):
    """Three pairs of 3x3 convolutions (32, 64, 128) and 128 hidden units, with tanh (Papernot et al. 2021, table 2).

    Args:
        classes: number of outputs.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(_pair(3, 32), _pair(32, 64), _pair(64, 128))
        self.linear1 = nn.Linear(128 * 4 * 4, 128)
        self.linear2 = nn.Linear(128, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 3, 32, 32) to logits (N, classes)."""
        out = torch.tanh(self.linear1(self.features(x).flatten(1)))
        logits: Tensor = self.linear2(out)
        return logits


def _pair(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
    )


def tanh_mnist(classes: int = 10) -> TanhMnist:
    """A network for private training on MNIST (Papernot et al. 2021), 26 thousand parameters."""
    return TanhMnist(classes)


def tanh_cifar10(classes: int = 10) -> TanhCifar:
    """A network for private training on CIFAR-10 (Papernot et al. 2021), 0.55 million parameters."""
    return TanhCifar(classes)
