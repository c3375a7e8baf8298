"""Small networks that detectors train for themselves, by the one training loop."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.detector import Learnt
from robust.fit import fit
from robust.recipe import Loss
from robust.rng import derive


class AutoEncoder(nn.Module):
    """Convolutions that halve an image and double it again; of odd sides the last pixel is repeated.

    Args:
        channels: of the image. width: of the hidden layers; what is left in the middle is width / (4 · channels) of it.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, 2 * width, 3, padding=1)
        self.middle = nn.Conv2d(2 * width, width, 3, padding=1)
        self.back = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.last = nn.Conv2d(2 * width, channels, 3, padding=1)

    def rebuild(self, x: Tensor) -> Tensor:
        """Images like x (N, C, H, W) in [0, 1]."""
        height, width = x.shape[2:]
        even = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        code = F.relu(self.middle(F.avg_pool2d(F.relu(self.first(even)), 2)))
        wide = F.interpolate(code, scale_factor=2, mode="nearest")
        return torch.sigmoid(self.last(F.relu(self.back(wide))))[:, :, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        """`rebuild`, flat."""
        return self.rebuild(x).flatten(1)


class Encoder(nn.Module):
    """Three strided convolutions and a linear layer: images to a space in which alike ones are near."""

    def __init__(self, channels: int, width: int, dimensions: int) -> None:
        super().__init__()
        sizes = [channels, width, 2 * width, 4 * width]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(sizes))
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.linear = nn.Linear(4 * width * 16, dimensions)

    def forward(self, x: Tensor) -> Tensor:
        """(N, dimensions) of x (N, C, H, W) in [0, 1]."""
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        found: Tensor = self.linear(self.pool(x).flatten(1))
        return found


def unit(x: Tensor, bounds: tuple[float, float]) -> Tensor:
    """x from its box to [0, 1]."""
    return (x - bounds[0]) / (bounds[1] - bounds[0])


def trained(module: nn.Module, x: Tensor, loss: Loss, *, epochs: int, lr: float, seed: int) -> Learnt:
    """The module's weights after a training on images x (N, C, H, W) in [0, 1], which starts from a keyed place."""
    with torch.random.fork_rng():
        torch.manual_seed(derive(seed, "weights"))
        for part in module.modules():
            if isinstance(part, (nn.Conv2d, nn.Linear)):
                part.reset_parameters()
    net = Classifier(module.to(x.device))
    net._checked = True  # it is no classifier, and its outputs are not logits
    nothing = torch.zeros(len(x), dtype=torch.long)
    fit(
        net, (x, nothing), loss=loss, epochs=epochs, lr=lr, batch_size=min(64, max(len(x) // 8, 2)), seed=seed
    )
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def named(prefix: str, weights: Mapping[str, Tensor]) -> Learnt:
    """Weights under a prefix."""
    return {f"{prefix}/{name}": value for name, value in weights.items()}


def below(prefix: str, learnt: Mapping[str, Tensor]) -> Learnt:
    """The weights that stand under a prefix."""
    return {
        name.removeprefix(f"{prefix}/"): value
        for name, value in learnt.items()
        if name.startswith(f"{prefix}/")
    }
