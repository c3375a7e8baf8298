"""What membership attacks see of a model: answers on samples, of the target and of reference models in and out.

A membership attack guesses which samples a model was trained on. It sees the target's answers on the samples in
question, and may have reference models of its own, each trained on a known half of them (`halves`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.errors import DataError, ModelError, RobustError
from robust.oracle import Oracle
from robust.rng import Draws

Tensors = Mapping[str, Tensor]
Keep = Callable[[str, Callable[[], dict[str, Tensor]]], Tensors]
"""``keep(name, make)``: a part that was made before under that name, or else what `make` makes."""

_BATCH = 128
_SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
VIEWS = tuple((mirrored, down, right) for down, right in _SHIFTS for mirrored in (False, True))
"""The queries of one sample: as it is, mirrored, then both shifted by a pixel each way (Carlini et al. 2022 ask 18)."""


def viewed(x: Tensor, query: int) -> Tensor:
    """Images x (N, C, H, W) as query number `query` of `VIEWS` shows them; zeros come in at the border."""
    mirrored, down, right = VIEWS[query]
    if mirrored:
        x = x.flip(3)
    if not (down or right):
        return x
    height, width = x.shape[2:]
    shifted = torch.zeros_like(x)
    shifted[:, :, max(down, 0) : height + min(down, 0), max(right, 0) : width + min(right, 0)] = x[
        :, :, max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)
    ]
    return shifted


def halves(samples: int, models: int, seed: int) -> Tensor:
    """(models, samples) bool: which samples each model is trained on, a random half each.

    Models come in pairs, of which the second has what the first has not, so that every sample is in exactly half of an
    even number of models. Model k does not depend on how many there are.
    """
    rows = torch.arange(samples)
    found = []
    for pair in range(-(-models // 2)):
        order = Draws(seed, "membership/halves", rows, pair).uniform(1)[:, 0].argsort(stable=True)
        inside = torch.zeros(samples, dtype=torch.bool)
        inside[order[: samples // 2]] = True
        found += [inside, ~inside]
    return torch.stack(found[:models]) if models else torch.zeros(0, samples, dtype=torch.bool)


@dataclass(frozen=True, eq=False)
class References:
    """An attacker's own models.

    Attributes:
        models: trained as the target was, as far as the attacker knows how.
        inside: (K, N) bool, which of the samples in question each was trained on.
        population_inside: (K, M) bool, likewise of the population; None for none of it.
    """

    models: Sequence[Classifier]
    inside: Tensor
    population_inside: Tensor | None = None

    def __post_init__(self) -> None:
        if self.inside.dtype != torch.bool or self.inside.dim() != 2 or len(self.inside) != len(self.models):
            raise DataError(
                f"inside is {tuple(self.inside.shape)} of {self.inside.dtype} for {len(self.models)} reference models; "
                "give bool (models, samples)"
            )


class Evidence:
    """All that membership attacks see; answers are asked for once and kept.

    Args:
        target: the model in question: a Classifier, or an Oracle of scores or labels.
        x: (N, C, H, W) samples in its box. y: (N,) their labels.
        references: the attacker's own models.
        population: (x, y) of further samples that the target was not trained on.
        seed: keys whatever attacks draw, together with `index` (N,), the samples' identities (default 0 to N-1).
        keep: where answers are kept; None for memory.

    Raises:
        DataError: shapes that do not fit, in one line.
    """

    def __init__(
        self,
        target: Classifier | Oracle,
        x: Tensor,
        y: Tensor,
        references: References | None = None,
        population: tuple[Tensor, Tensor] | None = None,
        seed: int = 0,
        index: Tensor | None = None,
        keep: Keep | None = None,
    ) -> None:
        if len(x) == 0 or y.shape != (len(x),) or y.is_floating_point():
            raise DataError(
                f"{len(x)} samples and labels {tuple(y.shape)} of {y.dtype}: give integers ({len(x)},), 1 or more"
            )
        if references is not None and references.inside.shape[1] != len(x):
            raise DataError(
                f"inside tells of {references.inside.shape[1]} samples, and there are {len(x)}; give one column each"
            )
        self.target, self.x, self.y = target, x, y.cpu().long()
        self.references, self.population, self.seed = references, population, seed
        self.index = torch.arange(len(x)) if index is None else index.cpu().long()
        self._memory: dict[str, Tensors] = {}
        self.keep: Keep = keep or self._remember

    def __len__(self) -> int:
        return len(self.x)

    @property
    def inside(self) -> Tensor:
        """(K, N) bool of the reference models; (0, N) without any."""
        none = torch.zeros(0, len(self), dtype=torch.bool)
        return none if self.references is None else self.references.inside.cpu()

    def logits(self, query: int = 0) -> Tensor:
        """(N, classes) float64: the target's logits on `VIEWS[query]`; logarithms of what answers probabilities."""
        return self._asked(f"answers/target-{query}", self.target, viewed(self.x, query))

    def labels(self) -> Tensor:
        """(N,) the classes that the target predicts."""
        if not (isinstance(self.target, Oracle) and self.target.answers == "labels"):
            return self.logits().argmax(1)
        oracle = self.target
        found = self.keep("answers/target-labels", lambda: {"labels": oracle.labels(self.x).cpu()})
        return found["labels"]

    def reference_logits(self, number: int, query: int = 0) -> Tensor:
        """(N, classes) float64: likewise of reference model `number`."""
        assert self.references is not None
        name = f"answers/reference-{number:04d}-{query}"
        return self._asked(name, lambda: self.references.models[number], viewed(self.x, query))  # type: ignore[union-attr]

    def population_logits(self, number: int | None = None) -> Tensor:
        """(M, classes) float64: of the population, by the target (None) or a reference model."""
        assert self.population is not None
        if number is None:
            return self._asked("answers/population-target", self.target, self.population[0])
        assert self.references is not None
        models = self.references.models
        return self._asked(f"answers/population-{number:04d}", lambda: models[number], self.population[0])

    def _asked(self, name: str, model: Classifier | Oracle | Callable[[], Classifier], x: Tensor) -> Tensor:
        def ask() -> dict[str, Tensor]:
            asked = model if isinstance(model, (Classifier, Oracle)) else model()
            parts = [
                (
                    asked.logits(part.to(asked.device))
                    if isinstance(asked, Classifier)
                    else asked.scores(part)
                ).cpu()
                for part in x.split(_BATCH)
            ]
            return {"logits": as_logits(torch.cat(parts))}

        logits = self.keep(name, ask)["logits"].double()
        if not bool(logits.isfinite().all()):
            raise ModelError(
                f"{name.partition('/')[2]} answers NaN or infinite scores; no membership can be told"
            )
        return logits

    def _remember(self, name: str, make: Callable[[], dict[str, Tensor]]) -> Tensors:
        if name not in self._memory:
            self._memory[name] = make()
        return self._memory[name]


def as_logits(scores: Tensor) -> Tensor:
    """Scores as they are, or the logarithms of probabilities: rows that are not negative and sum to 1."""
    total = scores.sum(1)
    if bool((scores >= 0).all()) and torch.allclose(total, torch.ones_like(total), atol=1e-4):
        return scores.clamp_min(1e-12).log()
    return scores


def require_balance(inside: Tensor, name: str, both: bool) -> None:
    """Raises one line unless every sample is out of some reference model, and in some where `both` are needed.

    Args:
        inside: (K, N) bool.
    """
    for kind, missing in (("in", ~inside.any(0)), ("out", inside.all(0))):
        if bool(missing.any()) and (kind == "out" or both):
            where = "outside of" if kind == "in" else "in"
            raise RobustError(
                f"{name}: sample {int(missing.nonzero()[0])} is {where} all {len(inside)} reference models; give an "
                "even number of models on complementary halves"
            )
