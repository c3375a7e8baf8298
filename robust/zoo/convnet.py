"""A small ConvNet for images of 28x28 or 32x32, for experiments that train many models."""

from __future__ import annotations

from torch import Tensor, nn


class ConvNet(nn.Module):
    """A small ConvNet: stages of convolution, batch norm, ReLU and pooling, the global mean, a linear layer.

    Args:
        classes: number of outputs.
        channels: of the input.
        widths: channels of each stage; every stage halves the resolution.
    """

    def __init__(self, classes: int = 10, channels: int = 3, widths: tuple[int, ...] = (32, 64, 128)) -> None:
        super().__init__()
        stages = [_stage(before, after) for before, after in zip((channels, *widths), widths, strict=False)]
        self.features = nn.Sequential(*stages)
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, H, W) to logits (N, classes); H and W are at least 2 to the number of stages."""
        logits: Tensor = self.linear(self.features(x).mean((2, 3)))
        return logits


def _stage(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
    )


def convnet(classes: int = 10) -> ConvNet:
    """A small ConvNet for coloured images, 0.1 million parameters."""
    return ConvNet(classes)


def convnet_grey(classes: int = 10) -> ConvNet:
    """A small ConvNet for grey images, 0.1 million parameters."""
    return ConvNet(classes, channels=1)
