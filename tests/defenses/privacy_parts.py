"""What the tests of private training share: the definition as a loop in float64, and layers to hold to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robust.defenses.privacy import PrivateOptimizer, make_private

Make = Callable[[], nn.Module]


class Scaled(nn.Module):
    """A parameter without dimensions and one that is broadcast, around a layer of a known kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.3))
        self.shift = nn.Parameter(torch.linspace(-1, 1, 5))
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """A line and a bend."""
        found: Tensor = self.inner(torch.tanh(x * self.scale + self.shift)) * self.scale
        return found


class ClassToken(nn.Module):
    """A learnt token in front of a sequence, with positions, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.position = nn.Parameter(torch.randn(1, 6, 4))
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 5, 4) to (B, 6, 4)."""
        found: Tensor = self.mix(torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.position).tanh()
        return found


class Tied(nn.Module):
    """An embedding whose table is the last layer's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """(B, T) indices to (B, T, 11)."""
        found: Tensor = self.head(self.table(x).tanh())
        return found


class Twice(nn.Module):
    """One layer that is used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """A layer behind itself."""
        found: Tensor = self.layer(self.layer(x).tanh())
        return found


def _numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape)


def _indices(high: int, *shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randint(0, high, (rows, *shape))


LAYERS: dict[str, tuple[Make, Callable[[int], Tensor]]] = {
    "linear": (lambda: nn.Linear(7, 5), _numbers(7)),
    "linear without bias": (lambda: nn.Linear(1, 1, bias=False), _numbers(1)),
    "linear on few positions": (lambda: nn.Linear(9, 8), _numbers(2, 3, 9)),
    "linear on many positions": (lambda: nn.Linear(3, 2), _numbers(41, 3)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, stride=3, padding=2), _numbers(3, 13)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=(1, 2), padding=(2, 0)), _numbers(3, 7, 6)),
    "conv2d 3x3": (lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False), _numbers(4, 5, 5)),
    "conv2d wide": (lambda: nn.Conv2d(24, 20, 3, padding=1), _numbers(24, 3, 3)),
    "conv2d pointwise": (lambda: nn.Conv2d(8, 4, 1, stride=2), _numbers(8, 5, 5)),
    "conv2d in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2), _numbers(4, 7, 7)),
    "conv2d by depth": (lambda: nn.Conv2d(4, 8, 3, groups=4), _numbers(4, 5, 6)),
    "conv2d same": (lambda: nn.Conv2d(2, 3, (4, 3), padding="same"), _numbers(2, 6, 5)),
    "conv2d circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), _numbers(2, 5, 5)),
    "conv2d large padding": (lambda: nn.Conv2d(2, 3, 2, padding=3), _numbers(2, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, (2, 3, 1), stride=(1, 2, 1), padding=1), _numbers(2, 3, 5, 2)),
    "conv transposed": (lambda: nn.ConvTranspose2d(3, 2, 3, stride=2), _numbers(3, 4, 4)),
    "embedding": (lambda: nn.Embedding(9, 4, padding_idx=2), _indices(9, 6)),
    "embedding of one": (lambda: nn.Embedding(9, 4), _indices(9)),
    "layer norm": (lambda: nn.LayerNorm(6), _numbers(6)),
    "layer norm on images": (lambda: nn.LayerNorm((3, 4)), _numbers(2, 3, 4)),
    "group norm": (lambda: nn.GroupNorm(3, 6), _numbers(6, 3, 5)),
    "group norm of vectors": (lambda: nn.GroupNorm(2, 6), _numbers(6)),
    "instance norm": (lambda: nn.InstanceNorm2d(3, affine=True), _numbers(3, 4, 3)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(3, affine=True), _numbers(3, 4)),
    "rms norm": (lambda: nn.RMSNorm(6), _numbers(2, 6)),
    "prelu": (lambda: nn.PReLU(), _numbers(4)),
    "bare parameters": (Scaled, _numbers(5)),
    "class token": (ClassToken, _numbers(5, 4)),
    "tied weights": (Tied, _indices(11, 3)),
    "used twice": (Twice, _numbers(3, 5, 5)),
}


def losses(output: Tensor) -> Tensor:
    """(B,) something smooth of every number of the output, in float64."""
    flat = output.double().flatten(1)
    weights = torch.linspace(-1, 2, flat.shape[1], dtype=torch.float64)
    return (flat * weights).sum(1) + 0.3 * flat.square().sum(1)


def sample_gradients(model: nn.Module, x: Tensor) -> list[list[Tensor]]:
    """Each sample's gradients, one list per sample, by a loop in float64."""
    exact = copy.deepcopy(model).double().train()
    wanted = [p for p in exact.parameters() if p.requires_grad]
    rows = x.double() if x.is_floating_point() else x
    return [list(torch.autograd.grad(losses(exact(row[None])).sum(), wanted)) for row in rows]


def length(gradients: list[Tensor]) -> float:
    """The norm over all parameters."""
    return float(torch.stack([g.norm() for g in gradients]).norm())


def clipped_sum(model: nn.Module, x: Tensor, bound: float) -> list[Tensor]:
    """Σ min(1, bound / ‖g‖) g over samples."""
    total = [torch.zeros_like(p, dtype=torch.float64) for p in model.parameters() if p.requires_grad]
    for gradients in sample_gradients(model, x):
        factor = min(1.0, bound / max(length(gradients), 1e-300))
        for all_of, one in zip(total, gradients, strict=True):
            all_of += factor * one
    return total


def private(model: nn.Module, **options: Any) -> PrivateOptimizer:
    """SGD of rate 1 over a model, private, without noise and without division unless told otherwise."""
    free = [p for p in model.parameters() if p.requires_grad]
    chosen = {"noise_multiplier": 0.0, "max_grad_norm": 1.0, "expected_batch_size": 1, "seed": 0, **options}
    return make_private(model, torch.optim.SGD(free, 1.0), None, **chosen)[1]


def gradients(model: nn.Module) -> list[Tensor]:
    """What the wrapped optimizer saw."""
    return [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference over the norm of what was expected."""
    difference = length([f.double() - e for f, e in zip(found, expected, strict=True)])
    return difference / max(length(expected), 1e-12)
