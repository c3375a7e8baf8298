"""What a training method is: a loss with named hyper-parameters, and nothing else of the training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from robust.classifier import Classifier

Loss = Callable[[Classifier, Tensor, Tensor, Tensor, int], Tensor]
"""``loss(clf, x, y, index, epoch_seed)``: the scalar to minimise for one batch.

`x` (B, C, H, W) lies in the model's box, `y` (B,) are labels, `index` (B,) int64 the samples' places in the data,
which key their randomness together with `epoch_seed`, a seed that differs from epoch to epoch.
"""


@dataclass(frozen=True)
class Recipe:
    """A training method: its fields are the hyper-parameters, its `loss` is what one step minimises."""

    def at(self, epoch: float) -> Self:
        """The recipe as it stands after `epoch` epochs, a fraction within one: where hyper-parameters move."""
        return self

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """The scalar to minimise for one batch, see `Loss`."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")
