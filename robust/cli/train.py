"""`robust train [MODEL]`: train a model with a recipe, from a configuration or from options."""

from __future__ import annotations

import json
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import dp, options
from robust.cli.progress import Meter, duration
from robust.errors import ConfigError, RunError

if TYPE_CHECKING:
    from robust.fit import FitResult
    from robust.trainer import Progress
    from robust.training import TrainConfig

RUNS = Path("runs")
EPOCHS = 20  # where neither a configuration nor an option says otherwise

Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="Such as pgd-at or trades; see robust list recipes.",
        show_default=False,
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", metavar="FILE.toml", help="The whole run; options override it.", show_default=False
    ),
]
Radius = Annotated[
    str | None,
    typer.Option("--eps", metavar="EPS", help="The recipe's radius, such as 8/255.", show_default=False),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another field of the recipe, or of the walk as fit.KEY.",
        show_default=False,
    ),
]
Epochs = Annotated[
    int | None, typer.Option("--epochs", metavar="N", help=f"Default: {EPOCHS}.", show_default=False)
]
Batch = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Default: 128.", show_default=False)
]
Rate = Annotated[float | None, typer.Option("--lr", metavar="LR", help="Default: 0.001.", show_default=False)]
KeySeed = Annotated[
    int | None,
    typer.Option("--seed", metavar="SEED", help="Keys first weights and every draw.", show_default=False),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="DIR", help="The run folder. Default: runs/train-RECIPE-DATA.", show_default=False
    ),
]
Board = Annotated[bool, typer.Option("--tensorboard", help="Write the history for TensorBoard, too.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")]


def train(
    model: options.Model = None,
    recipe: Recipe = None,
    data: options.DataName = None,
    config: Config = None,
    eps: Radius = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    lr: Rate = None,
    settings: Settings = None,
    seed: KeySeed = None,
    out: Out = None,
    resume: Resume = False,
    tensorboard: Board = False,
    dp_epsilon: dp.Epsilon = None,
    dp_delta: dp.Delta = None,
    dp_noise_multiplier: dp.Noise = None,
    dp_max_grad_norm: dp.Bound = None,
    dp_clipping: dp.Clipping = None,
    dp_accountant: dp.Accountant = None,
    dp_augmentations: dp.Augmentations = None,
    dp_secure_mode: dp.Secure = False,
    dp_fix: dp.Fix = False,
    weights: options.Weights = None,
    device: options.Device = None,
    data_root: options.DataRoot = None,
    as_json: options.Json = False,
) -> None:
    """Train a model and measure it: weights, history and conditions go into the run folder."""
    from robust.parallel import join_group

    writes = join_group().writes  # of torchrun's processes one reports
    walk = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "seed": seed}
    plan = _plan(config, model, data, recipe, [*(settings or []), *([f"eps={eps}"] if eps else [])], walk)
    asked: dict[str, str | int | bool | None] = {
        "epsilon": dp_epsilon, "delta": dp_delta, "noise_multiplier": dp_noise_multiplier,
        "max_grad_norm": dp_max_grad_norm, "clipping": dp_clipping, "accountant": dp_accountant,
        "augmentations": dp_augmentations, "secure_mode": dp_secure_mode,
    }  # fmt: skip
    privacy = dp.make_privacy(plan.privacy, asked)
    spec = dp.fixed(plan.model, dp_fix, privacy is not None)
    plan = replace(plan, tensorboard=tensorboard or plan.tensorboard, privacy=privacy, model=spec)
    plan.make_recipe()
    _check_paths(weights, data_root)
    folder = out or RUNS / f"train-{plan.recipe}-{plan.data.partition(':')[0]}"
    options.check_writable(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quiet = as_json or not writes
        result, found = _run(plan, folder, resume, weights, device, data_root, quiet=quiet)
    if not writes:
        return
    doubts = list(dict.fromkeys([*(str(warning.message) for warning in caught), *result.record["warnings"]]))
    if as_json:
        print(json.dumps(_summary(plan, result, found, doubts, folder)))
    else:
        _show(plan, result, found, doubts, folder)


def _run(
    plan: TrainConfig,
    folder: Path,
    resume: bool,
    weights: Path | None,
    device: str | None,
    data_root: Path | None,
    *,
    quiet: bool,
) -> tuple[FitResult, dict[str, Any]]:
    from robust.training import train_model

    with Meter("loading", quiet=quiet) as meter:

        def tell(event: Progress) -> None:
            loss = f", loss {event.loss:.4f}" if plan.privacy is None else ""  # which has no noise
            meter(event.step / event.steps, f"epoch {event.epoch}/{event.epochs}{loss}")

        try:
            return train_model(
                plan,
                folder,
                resume=resume,
                weights=weights,
                device=device,
                data_root=data_root,
                progress=tell,
            )
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; the same command with --resume --out {folder} goes on") from None


class Interrupted(RunError):
    """The user stopped a training that can be continued."""

    exit_code = 130


def _plan(
    config: Path | None,
    model: str | None,
    data: str | None,
    recipe: str | None,
    settings: list[str],
    walk: dict[str, Any],
) -> TrainConfig:
    """The configuration with the options over it."""
    from robust.config import from_mapping
    from robust.optimise import Settings as Walk
    from robust.training import TrainConfig, load_train_config

    plan = TrainConfig(fit=Walk(epochs=EPOCHS)) if config is None else load_train_config(config)
    if config is not None and recipe not in (None, plan.recipe):
        raise ConfigError(f"--recipe: {config} is for {plan.recipe}, not {recipe}; leave out one of them")
    chosen = dict(_setting(text) for text in settings)
    walk = {key: value for key, value in walk.items() if value is not None}
    walk |= {key.removeprefix("fit."): value for key, value in chosen.items() if key.startswith("fit.")}
    fields = {key: value for key, value in chosen.items() if not key.startswith("fit.")}
    return replace(
        plan,
        model=model or plan.model,
        data=data or (_data_of(model) if model and config is None else plan.data),
        recipe=recipe or plan.recipe,
        options=plan.options | fields,
        fit=from_mapping({**vars(plan.fit), **walk}, Walk, "fit"),
    )


def _data_of(model: str) -> str:
    """The data a shipped model was trained on; every other model has to be told."""
    from robust.zoo import ENTRIES

    entry = ENTRIES.get(model.removeprefix(dp.FIX).removeprefix("zoo:"))
    if entry is None:
        raise ConfigError(f"--data is missing: say what {model} shall learn, for example --data mnist")
    return entry.data


def _check_paths(weights: Path | None, data_root: Path | None) -> None:
    for option, path in (("--weights", weights), ("--data-root", data_root)):
        if path is not None and not path.exists():
            raise ConfigError(f"{option}: {path} does not exist")


def _setting(text: str) -> tuple[str, Any]:
    """``KEY=VALUE``, the value as TOML reads it, or else as text ("8/255")."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or not value.strip():
        raise ConfigError(f"--set: {text!r} sets nothing; write KEY=VALUE, for example steps=10")
    try:
        return key.strip(), tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def _summary(
    plan: TrainConfig, result: FitResult, found: dict[str, Any], doubts: list[str], folder: Path
) -> dict[str, Any]:
    how = found.get("pgd")
    return {
        "clean_accuracy": found["clean_accuracy"],
        "robust_accuracy": found.get("pgd_accuracy"),
        "n": found["n"],
        "threat": how and f"{how['norm']} {how['eps']:g}",
        "suite": how and f"pgd-{how['steps']}",
        "seconds": result.seconds,
        "warnings": doubts,
        "out": str(folder),
        "recipe": plan.recipe,
        "loss": result.history[-1].get("loss") if result.history else None,
        "privacy": result.record.get("privacy"),
    }


def _show(
    plan: TrainConfig, result: FitResult, found: dict[str, Any], doubts: list[str], folder: Path
) -> None:
    where = f"{found['n']} {found['part']} samples" if found["part"] != "all" else "the training data itself"
    rows = []
    if plan.privacy is None:
        rows += [("loss", f"{result.history[-1]['loss']:.4f} in epoch {len(result.history)}")]
    if found["clean_accuracy"] is None:
        rows += [
            ("clean accuracy", "not measured: there are training samples only, and no noise would cover it")
        ]
    else:
        rows += [("clean accuracy", f"{options.percent(found['clean_accuracy'])}   on {where}")]
    if how := found.get("pgd"):
        name = f"{how['norm']} {options.radius(how['eps'])}, PGD-{how['steps']}, {how['n']} samples"
        rows.append(("under attack", f"{options.percent(found['pgd_accuracy'])}   {name}"))
    rows += dp.rows_of(result.record)
    rows += [("doubt", line) for line in doubts]
    rows += [("time", duration(result.seconds)), ("weights", str(folder / "model.safetensors"))]
    options.show(f"{plan.model} on {plan.data}: {plan.recipe}, {plan.fit.epochs} epochs", rows)
    print(
        f"its verdict: robust eval {plan.model} --weights {folder / 'model.safetensors'} --data {plan.data}"
    )
