"""`robust privacy invert [MODEL]`: what of training images can be seen again in the gradients of a training step."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options
from robust.cli.interrupt import Out, ResumeMore, resumable
from robust.cli.progress import Meter
from robust.cli.settings import make_privacy_attacks, parse_settings
from robust.errors import ConfigError, UnknownName
from robust.registry import unknown

if TYPE_CHECKING:
    from robust.classifier import Classifier
    from robust.inversion import Protocol
    from robust.inversion_run import Question

ATTACK = "inverting-gradients"
COMPRESSIONS = ("keep", "bits")

Attacks = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        metavar="NAME[:KEY=VALUE,...]",
        help="Such as dlg:steps=300, or a list of names; may be repeated; see `robust list privacy-attacks`. "
        f"Default: {ATTACK}.",
        show_default=False,
    ),
]
Batch = Annotated[
    int, typer.Option("--batch", metavar="B", help="Samples over which a gradient is averaged.")
]
Clip = Annotated[
    str | None,
    typer.Option(
        "--dp-clip",
        metavar="C",
        help="Clip each sample's gradient to this norm, as DP-SGD does. Default: 1 where there is noise.",
        show_default=False,
    ),
]
Noise = Annotated[
    str | None,
    typer.Option(
        "--dp-noise",
        metavar="SIGMA",
        help="Noise on the sum of clipped gradients, as a multiple of the clip.",
        show_default=False,
    ),
]
Compress = Annotated[
    list[str] | None,
    typer.Option(
        "--compress",
        metavar="KEY=VALUE",
        help="keep=0.1 sends the largest tenth of the entries, bits=8 or bits=4 rounds them; may be repeated.",
        show_default=False,
    ),
]
LocalSteps = Annotated[
    int, typer.Option("--local-steps", metavar="N", help="Show the update of so many steps on the batch.")
]
LocalRate = Annotated[float, typer.Option("--local-lr", metavar="LR", help="Of those steps.")]
Known = Annotated[bool, typer.Option("--known-labels", help="Give the attacker the labels.")]
Untrained = Annotated[
    bool, typer.Option("--untrained", help="Take MODEL with random first weights, which the seed draws.")
]
HeldOut = Annotated[
    int,
    typer.Option(
        "--held-out",
        metavar="M",
        help="Further samples of DATA, from which the image-independent guess is made.",
    ),
]


def privacy_invert(
    model: options.Model = None,
    data: options.DataName = None,
    attack: Attacks = None,
    batch: Batch = 1,
    dp_clip: Clip = None,
    dp_noise: Noise = None,
    compress: Compress = None,
    local_steps: LocalSteps = 1,
    local_lr: LocalRate = 0.1,
    known_labels: Known = False,
    untrained: Untrained = False,
    held_out: HeldOut = 500,
    n: options.Count = 20,
    seed: options.Seed = 0,
    out: Out = None,
    resume: ResumeMore = False,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0,1",
    device: options.Device = None,
    data_root: options.DataRoot = None,
    as_json: options.Json = False,
) -> None:
    """Recover training images from gradients, as an observer sees them."""
    subject = options.make_subject(
        model, data, "linf", None, n=n, seed=seed, weights=weights, mean=mean, std=std, bounds=bounds, device=device,
        data_root=data_root,
    )  # fmt: skip
    attacks = make_privacy_attacks("inversion", attack or [ATTACK])
    protocol = make_protocol(batch, dp_clip, dp_noise, compress or [], local_steps, local_lr)
    if n % batch:
        raise ConfigError(
            f"--batch: {n} samples make no whole batches of {batch}; give --n as a multiple of it"
        )
    if held_out < 1:
        raise ConfigError(f"--held-out: {held_out} samples give no guess; give at least 1")
    if untrained and weights is not None:
        raise ConfigError(f"--untrained takes random weights, and --weights {weights}; leave out one of them")
    if subject.deployed:
        raise ConfigError(
            f"{subject.model} gives answers only; an observer of gradients has the model itself"
        )
    options.check_writable(out)
    with resumable(out), warnings.catch_warnings(), Meter("loading", quiet=as_json) as meter:
        options.hush()
        from robust.inversion_run import run_inversion

        question = _question(subject, attacks, protocol, known_labels, untrained, held_out)
        found = run_inversion(question, out=out, resume=resume, command=sys.argv, progress=meter)
    if as_json:
        told = {"n": found["data"]["n"], **found, "out": None if out is None else str(out)}
        print(json.dumps(told, ensure_ascii=False))
    else:
        show(found, out)


def make_protocol(
    batch: int, clip: str | None, noise: str | None, compress: Sequence[str], steps: int, lr: float
) -> Protocol:
    """How gradients come about, checked."""
    from robust.inversion import Protocol

    sigma = 0.0 if noise is None else options.number(noise, "--dp-noise")
    norm = 1.0 if clip is None and sigma else None if clip is None else options.number(clip, "--dp-clip")
    given = parse_settings(compress, "--compress")
    for key in given:
        if key not in COMPRESSIONS:
            raise UnknownName("--compress: " + unknown("setting", key, list(COMPRESSIONS)))
    keep, bits = given.get("keep", 1.0), given.get("bits")
    if isinstance(keep, str) or not isinstance(bits, int | None):
        raise ConfigError(f"--compress: keep={keep}, bits={bits}: a fraction such as 0.1, and 8 or 4")
    return Protocol(batch=batch, clip=norm, noise=sigma, keep=float(keep), bits=bits, steps=steps, lr=lr)


def _question(
    subject: options.Subject,
    attacks: Mapping[str, Any],
    protocol: Protocol,
    known: bool,
    untrained: bool,
    held_out: int,
) -> Question:
    """The private samples, the others, and the model."""
    from robust.data import load_data
    from robust.detection import Samples
    from robust.errors import DataError
    from robust.inversion_run import Question

    data = load_data(subject.data, n=subject.n + held_out, root=subject.data_root)
    if len(data) <= subject.n:
        raise DataError(
            f"--n: {subject.data} has {len(data)} samples, which leaves none for a guess; give a smaller --n"
        )
    x, y = data.tensors()
    clf = _model(subject, len(data.classes), untrained)
    low, high = clf.bounds
    x = x * (high - low) + low
    return Question(
        clf, Samples(x[: subject.n], y[: subject.n]), Samples(x[subject.n :], y[subject.n :]), attacks, protocol,
        known, subject.seed, {"data_name": subject.data, "untrained": untrained},
    )  # fmt: skip


def _model(subject: options.Subject, classes: int, untrained: bool) -> Classifier:
    """The classifier in evaluation mode."""
    from robust.models import load_classifier

    given = {"mean": subject.mean, "std": subject.std, "bounds": subject.bounds, "device": subject.device}
    if untrained:
        import torch

        from robust.rng import derive

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(subject.seed, "inversion/weights"))
            clf = load_classifier(subject.model, fresh=True, classes=classes or None, **given)
    else:
        clf = load_classifier(subject.model, weights=subject.weights, classes=classes or None, **given)
    clf.module.eval()
    return clf


def show(found: Mapping[str, Any], out: Path | None) -> None:
    """The table, and what it means."""
    from rich import box
    from rich.table import Table

    from robust.inversion_report import protocol_text

    title = f"inversion of {found['model']['name']} on {found['data_name']}: {found['data']['n']} samples"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attack", overflow="fold")
    for head in ("PSNR", "guess", "SSIM", "guess", "labels", "seconds"):
        table.add_column(head, no_wrap=True)
    for row in found["attacks"]:
        right = row["labels_right"]
        table.add_row(
            row["name"], f"{row['psnr']:.1f} dB", f"{row['guess_psnr']:.1f} dB", f"{row['ssim']:.3f}",
            f"{row['guess_ssim']:.3f}", "" if right is None else options.percent(right), f"{row['attack_seconds']:.1f}",
        )  # fmt: skip
    options.print_table(table)
    print(
        f"observed: {protocol_text(found['protocol'])}; medians; the guess, which looks at nothing, is the "
        f"{found['guess']['name']} of {found['held_out']['n']} other samples"
    )
    for line in found["warnings"]:
        print(f"doubt     {line}")
    if out is not None:
        print(f"saved to  {out}")
