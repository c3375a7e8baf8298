"""`robust privacy mia [MODEL]`: which of its training samples a model gives away, by membership attacks."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options
from robust.cli.interrupt import Out, ResumeMore, resumable
from robust.cli.progress import Meter
from robust.cli.settings import Answers, make_privacy_attacks, parse_settings
from robust.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    from robust.membership_run import Question

ATTACKS = "loss,entropy,modified-entropy,confidence,lira-online,lira-offline,rmia"
SHADOWS, TRAIN = 16, "train"
_RANGE = re.compile(r"(\d+)(?::(\d+))?")

Attacks = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        metavar="NAME[:KEY=VALUE,...]",
        help="Such as rmia:references=2, a list of names, or all; may be repeated; see `robust list privacy-attacks`. "
        f"Default: {ATTACKS}.",
        show_default=False,
    ),
]
Members = Annotated[
    str | None,
    typer.Option(
        "--members",
        metavar="ROWS",
        help="Which of the first N rows of DATA (of its training part, where it has parts) MODEL was trained on: rows "
        "and ranges such as 0:500,700, a FILE of them, or train: the training part, against the test part. None trains "
        "a target like MODEL on a random half.",
        show_default=False,
    ),
]
Shadow = Annotated[
    int | None,
    typer.Option(
        "--shadow",
        metavar="K",
        help=f"Reference models to train, an even number. Default: {SHADOWS}, where an attack needs any.",
        show_default=False,
    ),
]
Architecture = Annotated[
    str | None,
    typer.Option(
        "--reference-model",
        metavar="MODEL",
        help="What reference models are, where MODEL itself cannot be trained anew. Default: MODEL.",
        show_default=False,
    ),
]
Epochs = Annotated[
    int | None, typer.Option("--epochs", metavar="N", help="Of every model. Default: 30.", show_default=False)
]
Batch = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Default: 64.", show_default=False)
]
Rate = Annotated[float | None, typer.Option("--lr", metavar="LR", help="Default: 0.002.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="How models are trained besides: optimizer, schedule, weight_decay, precision, ..., and crop and flip.",
        show_default=False,
    ),
]


def privacy_mia(
    model: options.Model = None,
    data: options.DataName = None,
    attack: Attacks = None,
    members: Members = None,
    shadow: Shadow = None,
    reference_model: Architecture = None,
    epochs: Epochs = None,
    batch_size: Batch = None,
    lr: Rate = None,
    settings: Settings = None,
    n: options.Count = 1000,
    seed: options.Seed = 0,
    out: Out = None,
    resume: ResumeMore = False,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0,1",
    answers: Answers = None,
    device: options.Device = None,
    data_root: options.DataRoot = None,
    as_json: options.Json = False,
) -> None:
    """Measure which training samples a model gives away."""
    subject = options.make_subject(
        model, data, "linf", None, n=n, seed=seed, weights=weights, mean=mean, std=std, bounds=bounds, device=device,
        data_root=data_root, answers=answers,
    )  # fmt: skip
    attacks = make_privacy_attacks("membership", attack or [ATTACKS], every=True)
    if shadow is not None and (shadow < 0 or shadow % 2):
        raise ConfigError(
            f"--shadow: {shadow} reference models make no pairs; give an even number such as 16"
        )
    needed = max(item.needs() for item in attacks.values())
    shadows = shadow if shadow is not None else (max(SHADOWS, needed + needed % 2) if needed else 0)
    walk, augment = make_walk(epochs, batch_size, lr, settings or [])
    if members is None and (weights is not None or subject.deployed):
        raise ConfigError(
            f"--members is missing: say which samples {subject.model} was trained on, for example 0:500 or train"
        )
    options.check_writable(out)
    with resumable(out), warnings.catch_warnings(), Meter("loading", quiet=as_json) as meter:
        options.hush()
        from robust.membership_run import run_membership

        question = _question(
            subject, attacks, members, shadows, reference_model or subject.model, walk, augment
        )
        found = run_membership(question, out=out, resume=resume, command=sys.argv, progress=meter)
    if as_json:
        told = {"n": found["samples"]["n"], **found, "out": None if out is None else str(out)}
        print(json.dumps(told, ensure_ascii=False))
    else:
        show(found, out)


def make_walk(
    epochs: int | None, batch_size: int | None, lr: float | None, settings: Sequence[str]
) -> tuple[dict[str, Any], Any]:
    """How models are trained, checked, and how their samples are augmented (None: not at all)."""
    from robust.augment import Augment
    from robust.membership_run import WALK
    from robust.optimise import make_settings

    given = parse_settings(settings, "--set")
    changes = {key: given.pop(key) for key in ("crop", "flip") if key in given}
    options_given = {"epochs": epochs, "batch_size": batch_size, "lr": lr}
    walk = {**WALK, **given, **{key: value for key, value in options_given.items() if value is not None}}
    if "seed" in given:
        raise ConfigError("--set: seed is an option of its own, --seed")
    make_settings(walk)
    return walk, Augment(**changes) if any(changes.values()) else None


def _question(
    subject: options.Subject,
    attacks: Mapping[str, Any],
    members: str | None,
    shadows: int,
    architecture: str,
    walk: Mapping[str, Any],
    augment: Any,
) -> Question:
    """The samples, the target and how models like it are built."""
    from robust.detection import Samples
    from robust.membership_run import Question
    from robust.models import is_deployed, load_classifier

    x, y, mask, classes = samples(subject, members)
    target = None if members is None else subject.load()[0]

    def build() -> Any:
        return load_classifier(
            architecture, fresh=True, classes=classes, mean=subject.mean, std=subject.std, bounds=subject.bounds,
            device=subject.device,
        )  # fmt: skip

    trains = shadows > 0 or target is None
    if trains and is_deployed(architecture):
        raise ConfigError(
            f"{architecture} cannot be trained anew; name an architecture with --reference-model"
        )
    low, high = subject.bounds if target is None else target.bounds
    return Question(
        Samples(x * (high - low) + low, y), attacks, target, mask, build if trains else None, shadows, walk, augment,
        seed=subject.seed,
        about={"data_name": subject.data, "architecture": architecture, "parts": members == TRAIN},
    )  # fmt: skip


def samples(subject: options.Subject, members: str | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """Inputs in [0, 1], labels, which are members (None: not said), and the number of classes."""
    import torch

    from robust.data import load_data

    if members != TRAIN:
        part = load_data(subject.data, n=subject.n, root=subject.data_root, train=True)
        mask = None if members is None else member_mask(members, len(part))
        return *part.tensors(), mask, len(part.classes)
    half = subject.n // 2
    if half < 1:
        raise ConfigError(f"--n: {subject.n} samples hold no two kinds; give at least 2")
    seen = load_data(subject.data, n=half, root=subject.data_root, train=True)
    if seen.part != TRAIN:
        raise DataError(f"--members: {subject.data} has one part only; name the rows, for example 0:500")
    unseen = load_data(subject.data, n=half, root=subject.data_root)
    x, y = (torch.cat(pair) for pair in zip(seen.tensors(), unseen.tensors(), strict=True))
    return x, y, torch.arange(len(y)) < len(seen), len(seen.classes)


def member_mask(text: str, total: int) -> Tensor:
    """(total,) bool from rows and ranges such as ``0:500,700``, or from a file of them, one or more a line.

    Raises:
        ConfigError: what is no row, or lies outside, in one line.
    """
    import torch

    source, words = "--members", text.split(",")
    if not all(_RANGE.fullmatch(word.strip()) for word in words):
        source = text
        try:
            lines = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            raise ConfigError(
                f"--members: {text!r} is neither rows such as 0:500,700, nor a file of them, nor train"
            ) from None
        words = [word for line in lines for word in re.split(r"[,\s]+", line.partition("#")[0]) if word]
    mask = torch.zeros(total, dtype=torch.bool)
    for word in words:
        match = _RANGE.fullmatch(word.strip())
        if match is None:
            raise ConfigError(f"{source}: {word!r} is no row; write rows and ranges such as 0:500 700")
        first = int(match[1])
        end = first + 1 if match[2] is None else int(match[2])
        if end > total or first >= end:
            raise ConfigError(f"{source}: {word} is not among the {total} samples; rows are 0 to {total - 1}")
        mask[first:end] = True
    return mask


def show(found: Mapping[str, Any], out: Path | None) -> None:
    """The table, and what it means."""
    from rich import box
    from rich.table import Table

    counts = found["samples"]
    title = (
        f"membership of {found['target']['name']} on {found['data_name']}: {counts['members']} members, "
        f"{counts['others']} others, {found['references']['count']} reference models"
    )
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attack", overflow="fold")
    for head in ("TPR 0.1 %", "TPR 1 % (95 %)", "AUC (95 %)", ""):
        table.add_column(head, no_wrap=True)
    for row in found["attacks"]:
        (low, high), one = row["interval"], row["tpr"]["0.01"]
        first, last = (100 * end for end in one["interval"])
        table.add_row(
            row["name"], options.percent(row["tpr"]["0.001"]["fraction"]),
            f"{options.percent(one['fraction'])} ({first:.1f}-{last:.1f})", f"{row['auc']:.3f} ({low:.3f}-{high:.3f})",
            "chance" if row["at_chance"] else "",
        )  # fmt: skip
    options.print_table(table)
    where = "trained here on a random half" if found["target"]["trained_here"] else "as given"
    print(
        f"target {where}: right on {options.percent(found['accuracy']['members'])} of members, "
        f"{options.percent(found['accuracy']['others'])} of others; TPR: members found while so many others are "
        "taken for members"
    )
    for line in found["warnings"]:
        print(f"doubt     {line}")
    if out is not None:
        print(f"saved to  {out}")
