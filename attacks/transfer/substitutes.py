"""Substitutes of a model whose weights are unknown: trained on the same data, or on its own answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.attacks.transfer.pairs import Pairs
from robust.augment import Augment
from robust.classifier import Classifier
from robust.errors import RobustError
from robust.fit import fit
from robust.models import load_classifier
from robust.rng import derive
from robust.samples import load_samples
from robust.threat import Bounds
from robust.zoo.convnet import ConvNet

TINY = 256  # pixels up to which images are seen as vectors


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """How a substitute is trained.

    Attributes:
        architecture: "auto": a ConvNet whose stages follow from the images' size, or two dense layers up to 16 × 16
            pixels and for vectors; "mlp": those; or a model whose weights start afresh, as `load_classifier` names it.
        epochs: passes over the pairs, with Adam, a cosine schedule and one epoch of warm-up.
        batch_size: at most this many pairs in a step.
        lr: peak learning rate.
        temperature: of distilled scores, positive; labels have none.
        augment: whether larger images are shifted by an eighth of their size, and coloured ones mirrored.
        seed: keys first weights, order and augmentation.
    """

    architecture: str = "auto"
    epochs: int = 30
    batch_size: int = 64
    lr: float = 5e-3
    temperature: float = 1.0
    augment: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise RobustError(f"temperature={self.temperature} must be positive")


def train_substitute(
    data: tuple[Tensor, Tensor],
    *,
    bounds: Bounds = (0.0, 1.0),
    classes: int | None = None,
    device: str | torch.device | None = None,
    lesson: Lesson | None = None,
) -> Classifier:
    """A substitute trained on labelled data, such as the target's own (Papernot et al. 2016, arXiv:1605.07277).

    Args:
        data: x (N, C, H, W) in `bounds`, or uint8 for [0, 1]; y (N,) labels.
        bounds: the box of the inputs.
        classes: how many there are; the largest label plus one if None.
        device: where it is trained and lives; the CPU if None.
        lesson: how; see `Lesson`.
    """
    x, y = load_samples(data)
    count = classes or int(y.max()) + 1

    def loss(clf: Classifier, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
        return F.cross_entropy(clf(x), y)

    return _train(x, y, loss, count, bounds, lesson or Lesson(), device)


def distil(
    pairs: Pairs,
    *,
    bounds: Bounds = (0.0, 1.0),
    device: str | torch.device | None = None,
    lesson: Lesson | None = None,
) -> Classifier:
    """A substitute that answers as the black box did (Hinton et al. 2015, arXiv:1503.02531; arXiv:1812.02766).

    On scores it minimises T² KL(target ‖ substitute) at temperature T, on labels the cross-entropy.

    Args:
        pairs: from `queried_pairs`.
        bounds: the box of the inputs.
        device: where it is trained and lives; the CPU if None.
        lesson: how; see `Lesson`.
    """
    how = lesson or Lesson()
    scored, heat = pairs.answers.dim() == 2, how.temperature
    answers = pairs.answers.to(device or "cpu")
    goal = (answers / heat).log_softmax(1) if scored else answers

    def loss(clf: Classifier, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Tensor:
        if not scored:
            return F.cross_entropy(clf(x), y)
        own = (clf(x) / heat).log_softmax(1)
        return heat**2 * F.kl_div(own, goal[index], reduction="batchmean", log_target=True)

    return _train(pairs.x, pairs.labels, loss, pairs.classes, bounds, how, device)


def _train(
    x: Tensor,
    y: Tensor,
    loss: Callable[[Classifier, Tensor, Tensor, Tensor, int], Tensor],
    classes: int,
    bounds: Bounds,
    how: Lesson,
    device: str | torch.device | None,
) -> Classifier:
    statistics = _statistics(x)
    clf = untrained(tuple(x.shape[1:]), classes, how, bounds, statistics, device)
    augment = _augment(tuple(x.shape[1:])) if how.augment else None
    batch = min(how.batch_size, len(x))
    fit(
        clf, (x, y), loss=loss, epochs=how.epochs, batch_size=batch, lr=how.lr, schedule="cosine",
        warmup=min(1.0, how.epochs / 2), seed=derive(how.seed, "substitute"), augment=augment,
    )  # fmt: skip
    clf.logits(x[:1].float())  # from now on it knows its number of classes
    return clf


def _statistics(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel over the inputs; one of each for vectors."""
    values = (x.float() / 255 if x.dtype == torch.uint8 else x.float()).transpose(0, 1).flatten(1)
    values = values if x.dim() == 4 else values.reshape(1, -1)
    return values.mean(1).tolist(), values.std(1).clamp_min(1e-3).tolist()


def _augment(shape: tuple[int, ...]) -> Augment | None:
    if len(shape) != 3 or shape[1] * shape[2] <= TINY:
        return None
    return Augment(crop=min(shape[1:]) // 8, flip=shape[0] == 3)


def untrained(
    shape: tuple[int, ...],
    classes: int,
    how: Lesson,
    bounds: Bounds = (0.0, 1.0),
    statistics: tuple[list[float], list[float]] = ([0.0], [1.0]),
    device: str | torch.device | None = None,
) -> Classifier:
    """A substitute before its first lesson, in evaluation mode; first weights are keyed by the lesson's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(how.seed, "substitute", "init"))
        if how.architecture in ("auto", "mlp"):
            module = _network(shape, classes, how.architecture == "mlp")
        else:
            named = load_classifier(how.architecture, device=device or "cpu", classes=classes, fresh=True)
            module = named.module
    mean, std = statistics
    return Classifier(
        module.eval(), bounds=bounds, mean=mean, std=std, device=device or "cpu", name="substitute"
    )


def _network(shape: tuple[int, ...], classes: int, dense: bool) -> nn.Module:
    """An architecture for inputs of a shape."""
    if dense or len(shape) != 3 or shape[1] * shape[2] <= TINY or min(shape[1:]) < 6:
        size = int(torch.tensor(shape).prod())
        hidden = min(max(128, size), 512)
        return nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    stages = min(max((min(shape[1:]) // 3).bit_length() - 1, 1), 5)
    return ConvNet(classes, shape[0], tuple(min(32 << k, 256) for k in range(stages)))
