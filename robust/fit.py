"""The one training loop: keyed shuffling, schedules, averaged weights, checkpoints, and an exact resume after a kill.

What is trained for is a `Loss` or a `robust.recipe.Recipe`. Every number the loop draws is a function of
(seed, epoch, sample) or (seed, step), so that a run that was killed and resumed ends, on a CPU, with the same
bits as one that was not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from robust.checkpoint import prepare_folder
from robust.claim import claimed
from robust.classifier import Classifier
from robust.errors import RunError
from robust.optimise import Settings, make_settings
from robust.parallel import join_group
from robust.privacy import Privacy
from robust.private import PrivateTraining
from robust.recipe import Loss, Recipe
from robust.samples import load_samples
from robust.trainer import Augmentation, Progress, Training, Validation, Watch

if TYPE_CHECKING:
    from robust.data import Data


@dataclass
class FitResult:
    """A finished training.

    Attributes:
        classifier: the trained classifier (the given module, trained in place).
        history: one entry per epoch: epoch, loss, lr, and what `valid` measured.
        seconds: time spent, over all interruptions.
        settings: what the loop was told.
        record: what `train.json` says: settings, data, history, versions.
        out: the run folder, if any.
    """

    classifier: Classifier
    history: list[dict[str, float]]
    seconds: float
    settings: Settings
    record: dict[str, Any]
    out: Path | None


def fit(
    model: nn.Module | Classifier,
    data: Data | tuple[Tensor, Tensor],
    *,
    loss: Loss | Recipe,
    augment: Augmentation | None = None,
    device: str | torch.device | None = None,
    valid: Data | tuple[Tensor, Tensor] | Validation | None = None,
    keep: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    checkpoint_seconds: float = 30.0,
    progress: Callable[[Progress], None] | None = None,
    tensorboard: bool = False,
    privacy: Privacy | None = None,
    record: Mapping[str, Any] | None = None,
    **walk: Any,
) -> FitResult:
    """Train `model` in place on `data` for `loss`, by default with Adam, 128 samples a step.

    The processes of a ``torchrun`` share each batch; the first one writes.

    Args:
        model: a module that returns logits, or a `Classifier` (which knows box and normalisation).
        data: a `Data`, or (x, y): x (N, C, H, W) in the box, or uint8 for [0, 1]; y (N,) labels.
        loss: a recipe, or any callable ``loss(clf, x, y, index, epoch_seed)``.
        augment: ``augment(x, index, epoch_seed)``, for example `robust.augment.Augment(crop=4, flip=True)`.
        device: where a bare module is trained; a `Classifier` has its own.
        valid: held-out data, whose accuracy goes into the history, or a callable that measures the classifier.
        keep: the number of `valid` that decides from which epoch the weights are kept, None for the last: adversarial
            training overfits (Rice et al. 2020, arXiv:2002.11569).
        out: run folder: `model.safetensors` and `train.json` at the end, a checkpoint from time to time.
        resume: continue from the checkpoint in `out`; a folder without one is started in.
        checkpoint_seconds: time between two checkpoints.
        progress: called after every step.
        tensorboard: write the history as scalars to `out`/tensorboard.
        privacy: train with differential privacy. `loss` must then be a mean over samples, `model` be without batch
            normalisation, and `valid` and `keep` look at public data only: what they tell is not counted.
        record: what `train.json` should say besides, for example the configuration of the run.
        walk: the fields of `robust.optimise.Settings`: `epochs`, which must be given, `batch_size`, `lr`, `optimizer`,
            `schedule`, `ema`, `seed`, `precision`, …

    Raises:
        ConfigError: a field of the walk is unknown, its value makes no sense, or it cannot be combined with `privacy`.
        ModelError: the model cannot be trained on such data, or not with `privacy`.
        RunError: the loss became NaN or infinite, or `out` cannot be written or resumed.
    """
    settings = make_settings(walk)
    given = model if isinstance(model, Classifier) else Classifier(model, device=device)
    group = join_group()
    parts = (given, *load_samples(data), settings, loss, augment, Watch(valid, keep), group)
    training = Training(*parts) if privacy is None else PrivateTraining(*parts, privacy)
    with training.closing():
        if tensorboard and out is None:
            raise RunError("tensorboard=True has nowhere to write to; give out, the run folder")
        with claimed(out if group.writes else None):
            folder = None if out is None else prepare_folder(out, resume or not group.writes)
            training.run(folder, checkpoint_seconds, progress, tensorboard)
            found, place = training.summary(folder, record or {}), training.place
    return FitResult(given, place.history, place.seconds, settings, found, folder)
