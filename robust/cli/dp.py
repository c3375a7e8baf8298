"""The options that make `robust train` differentially private, and what it prints about it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.config import from_mapping, number
from robust.errors import ConfigError

if TYPE_CHECKING:
    from robust.privacy import Privacy

PANEL = "Differential privacy"
FIX = "groupnorm:"


def _option(name: str, metavar: str, text: str) -> Any:
    return typer.Option(name, metavar=metavar, help=text, show_default=False, rich_help_panel=PANEL)


Epsilon = Annotated[
    str | None,
    _option("--dp-epsilon", "EPSILON", "The budget to keep, such as 3; the noise for it is found."),
]
Delta = Annotated[
    str | None, _option("--dp-delta", "DELTA", "A probability below 1 / samples, such as 1e-5.")
]
Noise = Annotated[
    str | None,
    _option(
        "--dp-noise-multiplier",
        "SIGMA",
        "The noise itself, whose epsilon is then told; with --dp-epsilon it trains until that is spent.",
    ),
]
Bound = Annotated[
    str | None,
    _option("--dp-max-grad-norm", "C", "The bound on the norm of a sample's gradient. Default: 1."),
]
Clipping = Annotated[
    str | None,
    _option("--dp-clipping", "NAME", "flat (the default), per-layer, automatic or adaptive."),
]
Accountant = Annotated[
    str | None, _option("--dp-accountant", "NAME", "See robust list accountants. Default: pld.")
]
Augmentations = Annotated[
    int | None,
    _option(
        "--dp-augmentations", "K", "Augmented copies of a sample, whose mean gradient is clipped. Default: 1."
    ),
]
Secure = Annotated[
    bool,
    typer.Option(
        "--dp-secure-mode",
        help="Noise and samples from the system's cryptographic generator; steps that a resumed training repeats "
        "are paid for twice.",
        rich_help_panel=PANEL,
    ),
]
Fix = Annotated[
    bool,
    typer.Option(
        "--dp-fix",
        help=f"Train {FIX}MODEL: GroupNorm in place of batch normalisation, which mixes samples.",
        rich_help_panel=PANEL,
    ),
]


def make_privacy(given: Privacy | None, chosen: dict[str, str | int | bool | None]) -> Privacy | None:
    """The configuration's privacy with the options over it; None where neither asks for any.

    Args:
        chosen: fields of `Privacy` as the command line gave them; None or False where it did not.

    Raises:
        ConfigError: a value that makes no sense, or no epsilon, noise or delta.
    """
    from robust.privacy import Privacy

    numbers = ("epsilon", "delta", "noise_multiplier", "max_grad_norm")
    asked: dict[str, Any] = {
        key: value for key, value in chosen.items() if value is not None and value is not False
    }
    if not asked:
        return given
    asked |= {key: number(value) for key, value in asked.items() if key in numbers}
    table = {**({} if given is None else asdict(given)), **asked}
    return from_mapping({key: value for key, value in table.items() if value is not None}, Privacy, "privacy")


def fixed(model: str, fix: bool, private: bool) -> str:
    """The model's spec, with batch normalisation replaced where `fix` asks for it.

    Raises:
        ConfigError: there is no privacy to fix the model for.
    """
    if fix and not private:
        raise ConfigError("--dp-fix: this training is not private; give --dp-epsilon and --dp-delta, too")
    return FIX + model if fix and not model.startswith(FIX) else model


def rows_of(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What a table says of a training's record: what was spent, how, and under which assumptions."""
    if (found := record.get("privacy")) is None:
        return []
    cost = "infinite" if found["epsilon"] is None else f"{found['epsilon']:.4g}"
    how = f"epsilon {'at most ' if found['guaranteed'] else 'about '}{cost} at delta {found['delta']:g}"
    noise = f"noise {found['noise_multiplier']:.4g} over a norm of {found['max_grad_norm']:g} ({found['clipping']})"
    sample = f"a sample of {found['expected_batch_size']} on average, rate {found['sample_rate']:.4g}"
    return [
        ("privacy", f"{how} ({found['accountant']}); {found['steps']} steps, {noise}, {sample}"),
        *(("assumes", line) for line in found["assumptions"]),
    ]
