"""A whole training run as one description: model, data, recipe and walk, from a TOML file or the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.augment import Augment
from robust.checkpoint import RECORD
from robust.classifier import Classifier
from robust.config import from_mapping, load_config
from robust.data import load_data
from robust.digest import write_json
from robust.errors import ConfigError, UnknownName
from robust.fit import FitResult, fit
from robust.models import load_classifier
from robust.optimise import Settings
from robust.parallel import join_group
from robust.privacy import Privacy
from robust.recipe import Recipe, require
from robust.registry import room
from robust.rng import derive
from robust.samples import accuracy, in_box, load_samples
from robust.threat import make_threat
from robust.trainer import Progress


@dataclass(frozen=True)
class Measurement:
    """What is measured on the test part after the training, besides clean accuracy: PGD's success.

    Attributes:
        eps: radius in the unit of x.
        norm: "linf", "l2" or "l1".
        steps, restarts: of PGD.
        n: attack at most this many test samples; clean accuracy is measured on all of them.
        seed: keys PGD's random starts.
    """

    eps: float
    norm: str = "linf"
    steps: int = 20
    restarts: int = 1
    n: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class HoldOut:
    """Training samples that are held out and measured after every epoch; the best epoch's weights are kept.

    Attributes:
        n: so many, drawn by the walk's seed; none of them is trained on.
        eps: radius of a PGD attack on them, in the unit of x; None to measure clean accuracy alone.
        norm: "linf", "l2" or "l1". steps: of PGD.
        keep: whether the best epoch's weights are kept (by robust accuracy where there is an eps), or the last one's.
    """

    n: int = 1000
    eps: float | None = None
    norm: str = "linf"
    steps: int = 10
    keep: bool = True

    def __post_init__(self) -> None:
        require("n", self.n, self.n >= 1, "1 or more")
        require("steps", self.steps, self.steps >= 1, "1 or more")
        if self.eps is not None:
            make_threat(self.norm, self.eps)

    @property
    def kept(self) -> str | None:
        """The number that decides."""
        if not self.keep:
            return None
        return "valid_accuracy" if self.eps is None else "valid_robust_accuracy"

    def split(self, x: Tensor, y: Tensor, seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Samples (x, y) to train on, and those held out.

        Raises:
            ConfigError: there would be none left to train on.
        """
        require("n", self.n, self.n < len(x), f"less than the {len(x)} training samples")
        generator = torch.Generator().manual_seed(derive(seed, "hold-out"))
        order = torch.randperm(len(x), generator=generator)
        held, rest = order[: self.n].sort().values, order[self.n :].sort().values
        return (x[rest], y[rest]), (x[held], y[held])

    def validation(self, x: Tensor, y: Tensor, seed: int) -> Callable[[Classifier], dict[str, float]]:
        """Measures a classifier on the samples held out: `valid_accuracy`, and with an eps `valid_robust_accuracy`."""

        def measure(clf: Classifier) -> dict[str, float]:
            found = {"valid_accuracy": accuracy(clf, (x, y))}
            if self.eps is not None:
                attack = room("attacks").load("pgd")(
                    threat=make_threat(self.norm, self.eps), steps=self.steps
                )
                result = attack.run(clf, in_box(x), y, seed=seed, precision="original")
                found["valid_robust_accuracy"] = 1 - float(result.success.double().mean())
            return found

        return measure


@dataclass(frozen=True)
class TrainConfig:
    """What `robust train` reads from a TOML file.

    Attributes:
        fit: the walk, see `robust.optimise.Settings`; `seed` also keys the first weights.
        model: a model as `load_model` names it; of ``zoo:NAME`` the architecture is taken, not the weights.
        data: training data as `load_data` names it; its training part is used.
        recipe: a name of `robust list recipes`.
        options: the recipe's fields.
        augment: random crops and mirror images.
        mean, std, bounds: normalisation and box of the model's inputs.
        measure: how robustness is measured at the end; None for clean accuracy only.
        hold_out: what is measured after every epoch, and which epoch is kept; None for the last one.
        tensorboard: whether the history is also written for TensorBoard, to the run folder.
        privacy: the differential privacy that the training shall keep; None for none.
    """

    fit: Settings
    model: str = "zoo:digits"
    data: str = "digits"
    recipe: str = "standard"
    options: dict[str, Any] = field(default_factory=dict)
    augment: Augment | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    measure: Measurement | None = None
    hold_out: HoldOut | None = None
    tensorboard: bool = False
    privacy: Privacy | None = None

    def __post_init__(self) -> None:
        if self.privacy is not None and self.hold_out is not None:
            raise ConfigError(
                "hold_out cannot be combined with differential privacy: samples held out are training data too, and "
                "to choose an epoch by them spends what no accountant counts; leave it out"
            )

    def make_recipe(self) -> Recipe:
        """The recipe with its options; an unknown name or option is one `ConfigError` line."""
        recipe = from_mapping(self.options, recipe_class(self.recipe), f"recipe {self.recipe}")
        assert isinstance(recipe, Recipe)
        return recipe


def recipe_class(name: str) -> type[Any]:
    """The class of the recipe `name`."""
    cls = room("defenses.training").load(name)
    assert isinstance(cls, type)
    return cls


def load_train_config(path: str | Path) -> TrainConfig:
    """The description in a TOML file; the recipe's options are checked too, with their lines."""
    config = load_config(path, TrainConfig)
    try:
        recipe = recipe_class(config.recipe)
    except UnknownName as error:
        raise ConfigError(f"{path}: {error}") from None
    needs = any(f.default is f.default_factory is dataclasses.MISSING for f in fields(recipe))
    options = field() if needs else field(default_factory=recipe)
    checked = dataclasses.make_dataclass(
        "TrainConfig", [("options", recipe, options)], bases=(TrainConfig,), frozen=True, kw_only=True
    )
    strict: Any = load_config(path, checked)
    return replace(config, options=dataclasses.asdict(strict.options))


def new_model(config: TrainConfig, classes: int, weights: Path | None, device: str | None) -> Classifier:
    """The model before its first step: keyed first weights, or those of a file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(config.fit.seed, "init"))
        return load_classifier(
            config.model,
            weights=weights,
            mean=config.mean,
            std=config.std,
            bounds=config.bounds,
            device=device,
            classes=classes,
            fresh=weights is None,
        )


def train_model(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    weights: Path | None = None,
    device: str | None = None,
    data_root: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[FitResult, dict[str, Any]]:
    """Train as `config` says into the folder `out`, measure on the test part, and keep both in ``train.json``.

    Returns:
        The training, and what was measured: see `measured`.
    """
    recipe = config.make_recipe()
    config = replace(config, options=dataclasses.asdict(recipe))
    data = load_data(config.data, root=data_root, train=True)
    clf = new_model(config, len(data.classes), weights, device)
    samples, valid = load_samples(data), None
    if (held := config.hold_out) is not None:
        samples, apart = held.split(*samples, config.fit.seed)
        valid = held.validation(*apart, config.fit.seed)
    walk = {f.name: getattr(config.fit, f.name) for f in fields(config.fit)}
    record = {
        "config": dataclasses.asdict(config),
        "first_weights": None if weights is None else weights.name,
    }
    result = fit(
        clf,
        samples,
        loss=recipe,
        augment=config.augment,
        valid=valid,
        keep=None if held is None else held.kept,
        tensorboard=config.tensorboard,
        privacy=config.privacy,
        out=out,
        resume=resume,
        progress=progress,
        record=record,
        **walk,
    )
    group = join_group()
    found = group.same(measured(config, clf, data_root) if group.writes else {})
    if group.writes:
        write_json(out / RECORD, {**result.record, "measured": found})
    return result, found


def measured(config: TrainConfig, clf: Classifier, data_root: Path | None = None) -> dict[str, Any]:
    """Clean accuracy on the test part, accuracy under PGD where `config.measure` asks for it, and the conditions.

    Data that has one part only (a user's own files) is measured on that part, and ``part`` says so; after a private
    training it is not, as a number from training samples has no noise: then the accuracy is None.
    """
    test = load_data(config.data, root=data_root)
    if config.privacy is not None and test.part == "all":
        return {"part": test.part, "n": 0, "clean_accuracy": None}
    found: dict[str, Any] = {"part": test.part, "n": len(test), "clean_accuracy": accuracy(clf, test)}
    if (how := config.measure) is None:
        return found
    attack = room("attacks").load("pgd")(
        threat=make_threat(how.norm, how.eps), steps=how.steps, restarts=how.restarts
    )
    x, y = test.batch(range(min(how.n, len(test))))
    with clf.session():  # a model fresh from its training is in training mode, which is no doubt here
        broken = attack.run(clf, x, y, seed=how.seed).success
    return found | {
        "pgd_accuracy": 1 - float(broken.double().mean()),
        "pgd": {**dataclasses.asdict(how), "n": len(x)},
    }
