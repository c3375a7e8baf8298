"""ResNets for CIFAR (He et al. 2016, arXiv:1512.03385, section 4.2): depth 6n + 2, shortcuts without parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class Shortcut(nn.Module):
    """Option A's shortcut: every second pixel, the new channels zero, half of them on either side."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + added, ⌈H/2⌉, ⌈W/2⌉)."""
        half = self.added // 2
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.added - half))


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first block of a stage halves the resolution."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(width - channels)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels, H, W) to (N, width, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A stem of 16 channels, three stages of n blocks (16, 32, 64 channels), the global mean, a linear layer.

    Args:
        depth: 6n + 2 weighted layers.
        classes: number of outputs.
        channels: of the input.
        wider: factor of the channels of stem and stages (Zagoruyko & Komodakis 2016, arXiv:1605.07146).
    """

    def __init__(self, depth: int, classes: int = 10, channels: int = 3, wider: int = 1) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"depth {depth} is not 6n + 2; the published ones are 20, 32, 44, 56 and 110")
        widths = [wider * width for width in WIDTHS]
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks, 1)
        self.layer2 = _stage(widths[0], widths[1], blocks, 2)
        self.layer3 = _stage(widths[1], widths[2], blocks, 2)
        self.linear = nn.Linear(widths[2], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W), 32x32 in the paper, to logits (N, classes)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        logits: Tensor = self.linear(out.mean((2, 3)))
        return logits


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(Block(channels, width, stride), *(Block(width, width, 1) for _ in range(blocks - 1)))


def resnet20(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-20 (He et al. 2016), 0.27 million parameters."""
    return CifarResNet(20, classes)


def resnet20x2(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-20 of twice the width, 1.1 million parameters."""
    return CifarResNet(20, classes, wider=2)


def resnet32(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-32 (He et al. 2016), 0.46 million parameters."""
    return CifarResNet(32, classes)


def resnet44(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-44 (He et al. 2016), 0.66 million parameters."""
    return CifarResNet(44, classes)


def resnet56(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-56 (He et al. 2016), 0.85 million parameters."""
    return CifarResNet(56, classes)


def resnet110(classes: int = 10) -> CifarResNet:
    """CIFAR ResNet-110 (He et al. 2016), 1.7 million parameters."""
    return CifarResNet(110, classes)
