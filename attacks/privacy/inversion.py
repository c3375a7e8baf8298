"""What every inversion is: a frozen dataclass of hyper-parameters that makes images from what a model lets out."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.privacy.labels import infer_labels
from robust.classifier import Classifier
from robust.errors import ConfigError, RobustError
from robust.inversion import Observe, Protocol, Recovery, Watched, watched_gradient
from robust.rng import Draws, identities

DTYPES = {"float32": torch.float32, "float64": torch.float64}
STARTS = ("noise", "grey", "prior")


@dataclass(frozen=True, kw_only=True)
class InversionAttack:
    """The base of all inversions."""

    kind: ClassVar[str] = "inversion"
    sees: ClassVar[Literal["gradient", "confidences"]] = "gradient"

    @property
    def name(self) -> str:
        """The name in the registry."""
        from robust.attacks.privacy import REGISTRY

        own = f"{type(self).__module__}:{type(self).__qualname__}"
        return next((name for name, path in REGISTRY.items() if path == own), type(self).__name__)

    def config(self) -> dict[str, Any]:
        """The hyper-parameters by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(frozen=True, eq=False)
class Problem:
    """One observed gradient and what is known about it.

    Attributes:
        model: with its weights. values: (n,) the gradient. sent: (n,) bool, the entries that arrived; None for all.
        protocol: how it came about. shape: (C, H, W) of a sample. classes: number of logits.
        labels: (batch,) known or inferred; None where the attack makes its own.
        prior: (C, H, W) in [0, 1] of the box, the attacker's guess before anything is seen; None for mid-grey.
        seed, index: the key of whatever is drawn.
    """

    model: Watched
    values: Tensor
    sent: Tensor | None
    protocol: Protocol
    shape: tuple[int, ...]
    classes: int
    labels: Tensor | None
    prior: Tensor | None
    seed: int
    index: int

    def boxed(self, u: Tensor) -> Tensor:
        """Points of [0, 1] in the model's box."""
        low, high = self.model.clf.bounds
        return u * (high - low) + low

    def gradient(self, u: Tensor, p: Tensor) -> Tensor:
        """(n,) the gradient that samples u (batch, C, H, W) in [0, 1] with labels p (batch, classes) would give."""
        return self.arrived(self.protocol.expected(self.model, self.boxed(u), p))

    def arrived(self, flat: Tensor) -> Tensor:
        """The entries of a gradient that were sent; 0 for the others."""
        return flat if self.sent is None else flat * self.sent

    def one_hot(self, labels: Tensor) -> Tensor:
        """(batch, classes) in the computation's type."""
        return torch.nn.functional.one_hot(labels.to(self.values.device), self.classes).to(self.values)

    def starts(self, restarts: int, start: str) -> Tensor:
        """(restarts, batch, C, H, W) in [0, 1]: "noise" is uniform; the others are a given image, and close to it."""
        rows = identities(torch.full((restarts,), self.index), torch.arange(restarts))
        noise = Draws(self.seed, "inversion/start", rows).uniform(self.protocol.batch, *self.shape)
        if start != "noise":
            image = torch.full(self.shape, 0.5) if start == "grey" or self.prior is None else self.prior.cpu()
            # The first start is the image itself; others, and the samples of a batch, have to differ.
            apart = torch.ones(restarts, self.protocol.batch, *[1] * len(self.shape))
            apart[0, 0] = 0
            noise = (image + 0.1 * apart * (noise - 0.5)).clamp(0, 1)
        return noise.to(self.values)


@dataclass(frozen=True, kw_only=True)
class GradientInversion(InversionAttack):
    """The base of inversions of a gradient; a subclass says how it recovers.

    Batch statistics count as they stand (evaluation mode).
    """

    def __call__(
        self,
        clf: Classifier,
        observe: Observe,
        *,
        shape: tuple[int, ...],
        protocol: Protocol | None = None,
        labels: Tensor | None = None,
        prior: Tensor | None = None,
        seed: int = 0,
        index: int = 0,
    ) -> Recovery:
        """The samples that a gradient was computed from, as far as the attack finds them.

        Args:
            clf: the model with the weights at which the gradient was computed.
            observe: gives the gradient.
            shape: (C, H, W) of a sample.
            protocol: how the gradient came about; None: of one sample, as it is.
            labels: (batch,) where the attacker knows them; None: the attack finds them.
            prior: (C, H, W) in the box, a guess made without the gradient, for attacks that begin with one.
            seed: with `index`, the step's number, the key of all randomness.

        Raises:
            RobustError: a gradient, shape or labels that do not fit, in one line.
        """
        protocol = protocol or Protocol()
        if labels is not None and labels.shape != (protocol.batch,):
            raise ConfigError(
                f"labels {tuple(labels.shape)} for batch={protocol.batch}; give one for each sample"
            )
        low, high = clf.bounds
        model = Watched(clf, self.dtype())  # before the session, which freezes the parameters
        with clf.session():
            values = watched_gradient(list(observe()), model, self.name)
            try:
                classes = model.classes(torch.full((1, *shape), (low + high) / 2, device=clf.device))
            except (RuntimeError, ValueError) as error:
                raise RobustError(f"{self.name}: {clf.name} takes no samples of shape {shape}") from error
            sent = (values != 0) if protocol.keep < 1 else None
            scaled = None if prior is None else (prior - low) / (high - low)
            problem = Problem(model, values, sent, protocol, shape, classes, labels, scaled, seed, index)
            if labels is None and self.infers():
                problem = self._with_labels(problem)
            found = self.recover(problem)
        clf.cost.forwards += model.evaluations
        clf.cost.backwards += model.evaluations
        x = problem.boxed(found.x.detach().clamp(0, 1)).float().cpu()
        return Recovery(
            x, found.y.cpu(), found.objective, found.track.float().cpu(), model.evaluations, found.stopped
        )

    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return torch.float64

    def infers(self) -> bool:
        """Whether it wants the labels read from the gradient first, where they are not known."""
        return True

    def recover(self, problem: Problem) -> Recovery:
        """The samples in [0, 1] of the box, and what `Recovery` says besides."""
        raise TypeError(f"{type(self).__name__} is no complete attack: it does not say how it recovers")

    def _with_labels(self, problem: Problem) -> Problem:
        labels = infer_labels(
            problem.model, problem.values, problem.protocol, problem.classes, problem.shape, self.name
        )
        known = {name: getattr(problem, name) for name in problem.__dataclass_fields__}
        return Problem(**{**known, "labels": labels})


def require(name: str, good: bool, text: str) -> None:
    """Raises the one line for settings that are not possible."""
    if not good:
        raise ConfigError(f"{name}: {text}")
