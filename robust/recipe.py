"""What a training method is: a loss with named hyper-parameters, and what it asks of the training loop besides.

Most methods define `Recipe.loss` and nothing else. The other hooks have defaults under which the loop does what it
does for a bare loss.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar, Self

from torch import Tensor

from robust.classifier import Classifier, RobustWarning
from robust.errors import ConfigError

Loss = Callable[[Classifier, Tensor, Tensor, Tensor, int], Tensor]
"""``loss(clf, x, y, index, epoch_seed)``: the scalar to minimise for one batch.

`x` (B, C, H, W) lies in the model's box, `y` (B,) are labels, `index` (B,) int64 the samples' places in the data,
which key their randomness together with `epoch_seed`, a seed that differs from epoch to epoch.
"""

Memory = Mapping[str, Tensor]
"""What a recipe keeps from one step to the next, by name; the loop holds it, and writes it into every checkpoint."""


@dataclass(frozen=True)
class Recipe:
    """A training method: its fields are the hyper-parameters, its `loss` is what one step minimises.

    Attributes:
        probed: training samples that `probe` wants to see at the end of an epoch; 0 for no probe.
    """

    probed: ClassVar[int] = 0

    @property
    def repeats(self) -> int:
        """Steps in a row that the loop takes on each batch; an epoch then has so many times the steps."""
        return 1

    @property
    def second_order(self) -> bool:
        """Whether the loss differentiates a gradient, which a compiled model cannot."""
        return False

    def at(self, epoch: float) -> Self:
        """The recipe as it stands after `epoch` epochs, a fraction within one: where hyper-parameters move."""
        return self

    def check(self, clf: Classifier, x: Tensor) -> None:
        """Raises one line, before anything is written, unless this model can be trained on inputs like x."""

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """The scalar to minimise for one batch, see `Loss`."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def step(
        self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int, memory: Memory
    ) -> tuple[Tensor, Memory]:
        """The loss, for methods that remember: with what the step before left, and what this one leaves.

        `memory` is empty at first. It must be a function of the steps so far, so that a resumed training goes on
        with the same bits.
        """
        return self.loss(clf, x, y, index, epoch_seed), memory

    def probe(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, seed: int) -> dict[str, float]:
        """Numbers for the history, measured on `probed` training samples at the end of an epoch."""
        return {}

    def doubts(self, history: Sequence[Mapping[str, float]]) -> list[str]:
        """What the history of a training, one entry per epoch, makes doubtful: one line each."""
        return []

    @classmethod
    def unprivate(cls, **chosen: Any) -> str:
        """Why, with these fields, a weight gradient is not the mean of one for each sample alone; empty if it is.

        Differentially private training clips each sample's gradient, and refuses such a recipe with this reason.
        """
        return ""

    @classmethod
    def gradients(cls, **chosen: Any) -> float:
        """Gradients, of inputs or weights, that a step takes for each sample, about, with these fields."""
        return 1.0


@dataclass(frozen=True)
class Plain(Recipe):
    """A bare loss as a recipe."""

    function: Loss

    def loss(self, clf: Classifier, x: Tensor, y: Tensor, index: Tensor, epoch_seed: int) -> Tensor:
        """See `Loss`."""
        return self.function(clf, x, y, index, epoch_seed)


def described(part: object) -> Any:
    """A recipe, loss or augmentation as JSON: its name, and its fields where it is a dataclass."""
    if is_dataclass(part) and not isinstance(part, type):
        return {"name": type(part).__qualname__, **asdict(part)}
    return None if part is None else getattr(part, "__qualname__", type(part).__qualname__)


def warn_of_new_doubts(recipe: Recipe, history: Sequence[Mapping[str, float]]) -> None:
    """Warns of what the last entry of a history has made doubtful."""
    known = recipe.doubts(history[:-1])
    for doubt in recipe.doubts(history):
        if doubt not in known:
            warnings.warn(doubt, RobustWarning, stacklevel=3)


def require(name: str, value: object, good: bool, right: str) -> None:
    """Raises one `ConfigError` line unless `good`: hyper-parameter `name` is `value`, and must be `right`."""
    if not good:
        raise ConfigError(f"{name}={value} cannot be trained with; it must be {right}")
