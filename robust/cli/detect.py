"""`robust detect [MODEL]`: how well detectors tell adversarial inputs from clean ones, knowing attackers too."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options
from robust.cli.interrupt import Out, resumable
from robust.cli.progress import Meter
from robust.cli.settings import parted, spread
from robust.errors import ConfigError, RobustError, UnknownName
from robust.registry import room, unknown

if TYPE_CHECKING:
    from robust.classifier import Classifier
    from robust.data import Data
    from robust.detection import Samples

ATTACKS = ("pgd", "cw-l2", "detector-aware")
DETECTORS = ("mahalanobis",)
VERDICTS = {
    "falls": "falls to an attacker who knows it",
    "leans": "lets an attacker through who knows it, now and then",
    "stands": "stood against this one attack that knows it, which proves nothing",
    "untried": "was not attacked by anybody who knows it (--attack detector-aware)",
}

Detectors = Annotated[
    list[str] | None,
    typer.Option(
        "--detector",
        metavar="NAME[:KEY=VALUE,...]",
        help="mahalanobis, lid, feature-squeezing, region, magnet-error, magnet-divergence, similarity, or all; may be "
        "repeated. Default: mahalanobis.",
        show_default=False,
    ),
]
Attacks = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        metavar="NAME[:KEY=VALUE,...]",
        help="White-box attacks, such as pgd:steps=40 or a list of names; may be repeated. detector-aware knows each "
        "detector. similarity meets square, nes and hopskipjump instead. Default: pgd,cw-l2,detector-aware.",
        show_default=False,
    ),
]
Fpr = Annotated[
    str | None,
    typer.Option(
        "--fpr",
        metavar="RATE",
        help="The fraction of clean inputs that may be flagged. Default: 0.05, of queries 0.001.",
        show_default=False,
    ),
]
LearnData = Annotated[
    str | None,
    typer.Option(
        "--learn-data",
        metavar="DATA",
        help="Clean images that detectors learn from. Default: the training part of named data, else further samples "
        "of --data.",
        show_default=False,
    ),
]
Learn = Annotated[
    int, typer.Option("--learn", metavar="N", help="How many samples detectors learn from, at most.")
]
HeldOut = Annotated[
    int,
    typer.Option(
        "--held-out", metavar="N", help="How many further samples of --data set the thresholds, at most."
    ),
]
Accounts = Annotated[
    int,
    typer.Option("--accounts", metavar="N", help="similarity: samples that are attacked, one an account."),
]
Queries = Annotated[
    int, typer.Option("--queries", metavar="N", help="similarity: the most queries for each of them.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with an interrupted run, or add detectors and attacks to it.")
]


def detect(
    model: options.Model = None,
    data: options.DataName = None,
    detector: Detectors = None,
    attack: Attacks = None,
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    fpr: Fpr = None,
    n: options.Count = 100,
    learn: Learn = 1000,
    held_out: HeldOut = 1000,
    learn_data: LearnData = None,
    accounts: Accounts = 10,
    queries: Queries = 500,
    seed: options.Seed = 0,
    out: Out = None,
    resume: Resume = False,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0,1",
    device: options.Device = None,
    data_root: options.DataRoot = None,
    as_json: options.Json = False,
) -> None:
    """Measure detectors of adversarial inputs, also against an attacker who knows them."""
    counts = {"n": n, "learn": learn, "held-out": held_out, "accounts": accounts, "queries": queries}
    for option, value in counts.items():
        if value < 1:
            raise ConfigError(f"--{option}: {value} is too few; give at least 1")
    rate = None if fpr is None else options.number(fpr, "--fpr")
    if rate is not None and not 0 < rate < 1:
        raise ConfigError(f"--fpr: {rate:g} is no false-positive rate; give one in (0, 1) such as 0.05")
    subject = options.make_subject(
        model, data, norm, eps, n=n + held_out, seed=seed, weights=weights, mean=mean, std=std, bounds=bounds,
        device=device, data_root=data_root,
    )  # fmt: skip
    if len(subject.eps) > 1:
        raise ConfigError("--eps: detectors are measured at one radius")
    if subject.deployed:
        raise ConfigError(f"{subject.model} gives answers only; robust detect needs the model itself")
    chosen = make_detectors(detector or list(DETECTORS), subject.eps[0] if subject.norm == "linf" else None)
    attacks = make_attacks(attack or [",".join(ATTACKS)])
    options.check_writable(out)
    found = _run(
        subject, chosen, attacks, rate, n=n, learn=learn, learn_data=learn_data, accounts=accounts, queries=queries,
        out=out, resume=resume, quiet=as_json,
    )  # fmt: skip
    if as_json:
        print(json.dumps({**found, "out": None if out is None else str(out)}, ensure_ascii=False))
    else:
        show(found, out)


def make_detectors(texts: Sequence[str], eps: float | None) -> dict[str, Any]:
    """``["lid:neighbours=10", "all"]`` as detectors by the names the table gives them.

    Args:
        eps: of the images that detectors make to learn from, where nothing else is said.

    Raises:
        ConfigError, UnknownName: one line.
    """
    from robust.config import from_mapping

    registry, found = room("defenses"), dict[str, Any]()
    for text in spread(texts):
        name, given = parted(text, "--detector")
        known = [row for row in registry if registry.load(row).kind == "detector"]
        if name != "all" and name not in known:
            raise UnknownName("--detector: " + unknown("detector", name, known))
        for row in known if name == "all" else [name]:
            kind = registry.load(row)
            usual = {"eps": eps} if eps is not None and any(f.name == "eps" for f in fields(kind)) else {}
            label = row if row not in found else text.replace(":", " ")
            found[label] = from_mapping({**usual, **given}, kind, f"--detector {row}")
    return found


def make_attacks(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["pgd:steps=40", "cw-l2,detector-aware"]`` as names and their settings."""
    found: dict[str, dict[str, Any]] = {}
    for text in spread(texts):
        name, given = parted(text, "--attack")
        try:
            kind = room("attacks").load(name)
        except UnknownName as error:
            raise UnknownName(f"--attack: {error}") from None
        if kind.knowledge != "white" or kind.universal:
            raise ConfigError(
                f"--attack: {name} is no white-box attack on single samples; choose one such as pgd"
            )
        if name in found:
            raise ConfigError(f"--attack: {name} is given twice")
        from robust.cli.attack import hyper_parameters

        hyper_parameters(kind, [f"{key}={value}" for key, value in given.items()])
        found[name] = given
    return found


def _run(
    subject: options.Subject,
    detectors: Mapping[str, Any],
    attacks: Mapping[str, Any],
    fpr: float | None,
    *,
    n: int,
    learn: int,
    learn_data: str | None,
    accounts: int,
    queries: int,
    out: Path | None,
    resume: bool,
    quiet: bool,
) -> dict[str, Any]:
    from robust.detection import Question, run_detection

    with resumable(out), warnings.catch_warnings(), Meter("loading", quiet=quiet) as meter:
        options.hush()
        clf, data = subject.load_classifier()
        test, held_out, lessons = parts(subject, data, n, learn, learn_data, clf)
        question = Question(
            clf, test, held_out, lessons, detectors, attacks, subject.threats()[0], fpr, subject.seed,
            accounts, queries, {"data_name": subject.data, "learn_data": learn_data or subject.data},
        )  # fmt: skip
        return run_detection(question, out=out, resume=resume, command=sys.argv, progress=meter)


def parts(
    subject: options.Subject, data: Data, n: int, learn: int, learn_data: str | None, clf: Classifier
) -> tuple[Samples, Samples, Samples]:
    """Samples under attack, those that set thresholds, and those that detectors learn from: no sample is in two."""
    from robust.data import load_data
    from robust.detection import Samples

    low, high = clf.bounds

    def samples(part: Data, boxed: bool) -> Samples:
        x, y = part.tensors()
        return Samples(x if boxed else x * (high - low) + low, y)

    if len(data) < n + 2:
        raise RobustError(f"{subject.data} holds {len(data)} samples; --n {n} leaves none to set thresholds")
    test = samples(data.subset(range(n)), True)
    held_out = data.subset(range(n, len(data)))
    if learn_data is not None:
        return (
            test,
            samples(held_out, True),
            samples(load_data(learn_data, n=learn, root=subject.data_root), False),
        )
    if data.part == "test":
        more = load_data(subject.data, n=learn, root=subject.data_root, train=True)
        return test, samples(held_out, True), samples(more, False)
    whole = load_data(subject.data, n=subject.n + learn, root=subject.data_root)
    if len(whole) > subject.n:
        return test, samples(held_out, True), samples(whole.subset(range(subject.n, len(whole))), False)
    middle = len(held_out) // 2  # a small folder: half of what is left for each
    return (
        test,
        samples(held_out.subset(range(middle)), True),
        samples(held_out.subset(range(middle, len(held_out))), True),
    )


def show(found: Mapping[str, Any], out: Path | None) -> None:
    """The tables, and what they mean."""
    threat = found["threat"]
    title = (
        f"detectors of {found['model']['name']} on {found['data_name']}: {found['data']['test']['n']} samples, "
        f"{threat['norm']} {options.radius(threat['eps'])}"
    )
    single = [row for row in found["detectors"] if not row["detector"]["stateful"]]
    watching = [row for row in found["detectors"] if row["detector"]["stateful"]]
    if single:
        _table(title, single, _SINGLE)
    if watching:
        _table(f"{title}, {found['queries']} queries a sample", watching, _WATCHING)
    for row in found["detectors"]:
        flagged, rate = row["clean_flagged"], row["detector"]["fpr"]
        low, high = (options.percent(value) for value in flagged["interval"])
        print(
            f"{row['name']:18} {VERDICTS[row['verdict']]}; flags {options.percent(flagged['fraction'])} of clean "
            f"inputs ({low} to {high}), asked for {100 * rate:g} %"
        )
    if out is not None:
        print(f"saved to  {out}")


def _auc(told: Mapping[str, Any]) -> str:
    if told.get("auc") is None:
        return ""
    between = told.get("interval")
    return f"{told['auc']:.2f}" + (f" ({between[0]:.2f}-{between[1]:.2f})" if between else "")


def _tpr(told: Mapping[str, Any]) -> str:
    return (
        ", ".join(f"{100 * told['tpr'][rate]:.0f}" for rate in ("0.01", "0.05")) + " %"
        if told.get("tpr")
        else ""
    )


_SINGLE = {
    "wrong": lambda told: options.percent(told["broken"] / max(told["n"], 1)),
    "AUC (95 %)": _auc,
    "TPR 1, 5 %": _tpr,
    "flagged": lambda told: options.percent(told["flagged"]["fraction"]) if told["broken"] else "",
    "past it": lambda told: options.percent(told["success"]["fraction"]),
}
_WATCHING = {
    "wrong": lambda told: f"{told['broken']}/{told['n']}",
    "queries": lambda told: f"{told['mean_queries']:.0f}",
    "detected": lambda told: options.percent(told["detected"]["fraction"]),
    "first": lambda told: "" if told["first_detection"] is None else f"{told['first_detection']:g}",
    "times": lambda told: f"{told['mean_detections']:.1f}",
    "AUC": _auc,
    "past it": lambda told: options.percent(told["success"]["fraction"]),
}


def _table(title: str, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> None:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("", *columns):
        table.add_column(head, no_wrap=True)
    for row in rows:
        table.add_row(row["name"])
        for attack, told in row["attacks"].items():
            table.add_row(f" {attack}", *(cell(told) for cell in columns.values()))
    options.print_table(table)
