"""The network of the embedded default: scikit-learn's 8x8 digits in a fraction of a megabyte."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """A small ConvNet for 8x8 grey images: three convolutions (32, 32, 64) with batch norm, a linear layer; 154 kB.

    Args:
        classes: number of outputs.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.conv3 = nn.Conv2d(32, 64, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(64)
        self.linear = nn.Linear(64 * 4 * 4, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 8, 8) to logits (N, classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.max_pool2d(F.relu(self.bn2(self.conv2(out))), 2)
        out = F.relu(self.bn3(self.conv3(out)))
        logits: Tensor = self.linear(out.flatten(1))
        return logits
