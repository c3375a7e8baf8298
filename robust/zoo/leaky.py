"""Two small networks without normalisation for 32x32 images, on which papers measure what gradients leak."""

from __future__ import annotations

from torch import Tensor, nn


class LeakyLeNet(nn.Module):
    """Three 5x5 convolutions, of strides 2, 2 and 1, and one linear layer, all with biases.

    Args:
        activation: after each convolution.
        classes: number of outputs.
        channels: of the input.
        width: channels of each convolution.
        spread: weights and biases are uniform on [-spread, spread]; None: as PyTorch draws them.
    """

    def __init__(
        self,
        activation: type[nn.Module],
        classes: int,
        channels: int,
        width: int,
        spread: float | None = None,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 5, padding=2, stride=2),
            activation(),
            nn.Conv2d(width, width, 5, padding=2, stride=2),
            activation(),
            nn.Conv2d(width, width, 5, padding=2),
            activation(),
        )
        self.linear = nn.Linear(width * 64, classes)
        if spread is not None:
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -spread, spread)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, channels, 32, 32) to logits (N, classes)."""
        logits: Tensor = self.linear(self.features(x).flatten(1))
        return logits


def lenet_sigmoid(classes: int = 10) -> LeakyLeNet:
    """The LeNet of DLG (Zhu et al. 2019): sigmoids, 12 channels, weights uniform on [-0.5, 0.5]; 16 thousand."""
    return LeakyLeNet(nn.Sigmoid, classes, channels=3, width=12, spread=0.5)


def lenet_relu(classes: int = 10) -> LeakyLeNet:
    """A ReLU ConvNet for gradient inversion: as lenet-sigmoid, 64 channels wide, PyTorch's weights; 0.25 million."""
    return LeakyLeNet(nn.ReLU, classes, channels=3, width=64)
