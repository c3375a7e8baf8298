"""Free adversarial training (Shafahi et al. 2019, arXiv:1904.12843)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.base import Attack
from robust.attacks.whitebox.fgsm import FGM
from robust.classifier import Classifier
from robust.defenses.training.single_step import SingleStepRecipe
from robust.defenses.training.weights import attached, trainable
from robust.recipe import Memory, require

_DELTA = "delta"


@dataclass(frozen=True, kw_only=True)
class Free(SingleStepRecipe):
    """Free adversarial training: one gradient moves weights and perturbation (Shafahi et al. 2019, arXiv:1904.12843).

    Their algorithm 1: each batch is replayed m times; every replay descends with the weights at x + δ and then climbs
    with δ, by eps along the sign of the input gradient that the same backward pass gave, clipped to the ball. δ is not
    reset between batches: the next batch starts from it, position by position. x + δ is clipped to the box. In l2
    and l1 step and ball are the norm's. Choose a number of epochs m times smaller than for a standard training.

    δ (B, C, H, W) is in every checkpoint. Training in parts of a batch is not what the paper does: δ would pass from
    part to part.

    Attributes:
        replays: steps on each batch, the paper's m: 8 for its CIFAR-10.
    """

    replays: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require("replays", self.replays, self.replays >= 1, "1 or more")

    @property
    def repeats(self) -> int:
        """See `Recipe.repeats`."""
        return self.replays

    def attack(self) -> Attack:
        """The step that δ takes, from the clean point: for the probe only, training has δ itself."""
        return FGM(threat=self.threat)

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """The loss of a first step, at δ = 0."""
        return self.step(clf, x, y, index, epoch_seed, {})[0]

    def step(
        self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """Mean cross-entropy at x + δ, and the next δ."""
        held = memory[_DELTA].to(x) if _DELTA in memory else torch.zeros_like(x)
        delta = torch.zeros_like(x)
        delta[: len(held)] = held[: len(x)]
        threat, width = self.threat, clf.bounds[1] - clf.bounds[0]
        points = threat.project(x + delta, x, clf.bounds).requires_grad_(True)
        parameters = trainable(clf.module)
        value = F.cross_entropy(clf(points), y)
        uphill, *downhill = torch.autograd.grad(value, [points, *parameters], allow_unused=True)
        size = torch.full((len(x),), self.eps).to(x)
        changed = threat.step(delta, uphill, size, torch.zeros_like(x), (-width, width))
        return attached(value, parameters, downhill), {_DELTA: torch.cat([changed, held[len(x) :]])}

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """One, which is what the name says."""
        return 1.0

    @classmethod
    def unprivate(cls, **chosen: Any) -> str:
        """Replays, and a perturbation that passes from batch to batch."""
        return "it takes several steps on the same batch, and hands a perturbation on that no noise covers"
