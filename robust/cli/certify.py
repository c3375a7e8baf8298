"""`robust certify [MODEL]`: radii within which no attack can change the class, with their confidence."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options
from robust.cli.interrupt import Out, Resume, resumable
from robust.cli.progress import Meter
from robust.errors import ConfigError, VerificationError
from robust.registry import room, unknown

if TYPE_CHECKING:
    from robust.verdict import Verdict

METHODS = ("smoothing", "ibp", "crown", "clever")
NOISES, PRECISIONS = ("gaussian", "laplace", "uniform"), ("float32", "original", "bfloat16")
_SMOOTHING = {"sigma": "0.25", "n0": 100, "n": 10_000, "alpha": "0.001", "noise": "gaussian"}

Method = Annotated[str, typer.Option("--method", metavar="NAME", help="smoothing, ibp, crown or clever.")]
Samples = Annotated[int, typer.Option("--samples", metavar="N", help="How many data points, at most.")]
Sigma = Annotated[
    str, typer.Option("--sigma", metavar="SIGMA", help="smoothing: the noise, in the unit of the inputs.")
]
Noise = Annotated[
    str, typer.Option("--noise", metavar="NAME", help="smoothing: gaussian (l2), laplace or uniform (l1).")
]
First = Annotated[int, typer.Option("--n0", metavar="N", help="smoothing: votes that choose the class.")]
Votes = Annotated[int, typer.Option("--n", metavar="N", help="smoothing: votes that bound its probability.")]
Alpha = Annotated[
    str, typer.Option("--alpha", metavar="P", help="smoothing: the chance of a wrong radius, per data point.")
]
Radius = Annotated[
    str | None,
    typer.Option(
        "--radius",
        metavar="R,...",
        help="smoothing: radii of the table, and what --sequential decides. Default: sigma and twice sigma.",
        show_default=False,
    ),
]
Sequential = Annotated[
    bool,
    typer.Option("--sequential", help="smoothing: stop a point's votes as soon as every radius is decided."),
]
Norm = Annotated[
    str | None,
    typer.Option(
        "--norm",
        metavar="NORM",
        help="ibp, crown, clever: linf (the default); crown and clever also l2 and l1.",
        show_default=False,
    ),
]
Eps = Annotated[
    str | None,
    typer.Option(
        "--eps",
        metavar="EPS,...",
        help="ibp, crown, clever: radii of the table, such as 2/255,8/255; no larger one is tried. "
        "Default: the usual radius for the data.",
        show_default=False,
    ),
]
Precision = Annotated[
    str,
    typer.Option(
        "--precision",
        metavar="PRECISION",
        help="smoothing: who votes, and so whom the certificate is for: float32 (the folded twin, the same but for "
        "rounding), original, or bfloat16.",
    ),
]
Beside = Annotated[
    Path | None,
    typer.Option(
        "--verdict",
        metavar="RUN",
        help="A run of `robust eval` on the same samples in the same norm, drawn beside.",
        show_default=False,
    ),
]


def certify(
    model: options.Model = None,
    data: options.DataName = None,
    method: Method = "smoothing",
    sigma: Sigma = "0.25",
    n0: First = 100,
    n: Votes = 10_000,
    alpha: Alpha = "0.001",
    radius: Radius = None,
    sequential: Sequential = False,
    noise: Noise = "gaussian",
    norm: Norm = None,
    eps: Eps = None,
    samples: Samples = 200,
    seed: options.Seed = 0,
    out: Out = None,
    resume: Resume = False,
    verdict: Beside = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0,1",
    precision: Precision = "float32",
    device: options.Device = None,
    data_root: options.DataRoot = None,
    as_json: options.Json = False,
) -> None:
    """Certify radii within which no attack can change the class, with their confidence."""
    votes = {"sigma": sigma, "n0": n0, "n": n, "alpha": alpha, "noise": noise}
    kind = _kind(method)
    _refuse(method, votes, radius=radius, sequential=sequential, norm=norm, eps=eps, precision=precision)
    smooth = method == "smoothing"
    fields, settings = _smoothing(votes, sequential, precision, seed) if smooth else ({}, {})
    place = ("l2" if noise == "gaussian" else "l1") if smooth else (norm or "linf")
    if place not in kind.norms:
        raise ConfigError(f"--norm: {method} has no {place} form; it knows {', '.join(kind.norms)}")
    if samples < 1:
        raise ConfigError(f"--samples: {samples} points cannot be certified; give at least 1")
    subject = options.make_subject(
        model, data, place, (radius or _usual(fields["sigma"])) if smooth else eps, n=samples, seed=seed,
        weights=weights, mean=mean, std=std, bounds=bounds, device=device, data_root=data_root,
    )  # fmt: skip
    if subject.deployed:
        raise ConfigError(f"{subject.model} gives answers only; robust certify needs the model itself")
    if not all(r < float("inf") for r in subject.eps):
        raise ConfigError("--radius: an unbounded radius cannot be certified")
    settings["radii"] = list(subject.eps)
    if not smooth:
        fields = {"threat_norm": place, **({"seed": seed} if method == "clever" else {})}
    beside = _verdict(verdict)
    options.check_writable(out)
    found = _run(subject, kind, fields, settings, out, beside, resume=resume, quiet=as_json)
    if as_json:
        print(json.dumps({**found, "out": None if out is None else str(out)}, ensure_ascii=False))
    else:
        _show(found, subject, out)
    if found.get("contradicted"):
        raise VerificationError(
            f"samples {found['contradicted']} are certified and yet broken within their radius; one is wrong"
        )


def _run(
    subject: options.Subject,
    kind: Any,
    fields: dict[str, Any],
    settings: dict[str, Any],
    out: Path | None,
    verdict: Verdict | None,
    *,
    resume: bool,
    quiet: bool,
) -> dict[str, Any]:
    from robust.certify import run_certificate

    with resumable(out), warnings.catch_warnings(), Meter("loading", quiet=quiet) as meter:
        options.hush()
        clf, data = subject.load_classifier()
        return run_certificate(
            kind(clf, **fields), data, settings, subject.eps, out=out, resume=resume, verdict=verdict,
            command=sys.argv, progress=meter,
        )  # fmt: skip


def _kind(method: str) -> Any:
    if method not in METHODS:
        raise ConfigError("--method: " + unknown("certificate", method, list(METHODS)))
    return room("defenses").load(method)


def _refuse(method: str, given: dict[str, Any], **others: Any) -> None:
    """Options of another method are refused before anything is loaded."""
    if method == "smoothing":
        wrong = [name for name in ("norm", "eps") if others[name] is not None]
        hint = "smoothing takes --radius, and its norm is the noise's"
    else:
        wrong = [name for name, value in given.items() if value != _SMOOTHING[name]]
        wrong += ["radius"] if others["radius"] else []
        wrong += ["sequential"] if others["sequential"] else []
        wrong += ["precision"] if others["precision"] != "float32" else []
        hint = f"{method} takes --eps and --norm"
    if wrong:
        raise ConfigError(f"--{wrong[0]}: {method} does not take it; {hint}")


def _smoothing(
    given: dict[str, Any], sequential: bool, precision: str, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The certificate's fields and the settings of its votes, checked before anything is loaded."""
    sigma, alpha = (options.number(given[name], f"--{name}") for name in ("sigma", "alpha"))
    if not 0 < sigma < float("inf"):
        raise ConfigError(f"--sigma: {sigma:g} is no noise; give a positive number such as 0.25")
    for name in ("n0", "n"):
        if given[name] < 1:
            raise ConfigError(f"--{name}: {given[name]} votes decide nothing; give at least 1, such as 10000")
    if not 0 < alpha < 1:
        raise ConfigError(f"--alpha: {alpha:g} is no chance of error; give one in (0, 1) such as 0.001")
    for option, value, known in (("--noise", given["noise"], NOISES), ("--precision", precision, PRECISIONS)):
        if value not in known:
            raise ConfigError(f"{option}: " + unknown(option[2:], value, list(known)))
    fields = {"sigma": sigma, "noise": given["noise"], "precision": precision, "seed": seed}
    return fields, {"n0": given["n0"], "n": given["n"], "alpha": alpha, "sequential": sequential}


def _usual(sigma: float) -> str:
    """The radii that papers report for a noise."""
    return f"{sigma:g},{2 * sigma:g}"


def _verdict(run: Path | None) -> Verdict | None:
    if run is None:
        return None
    from robust.verdict import Verdict

    if not run.is_dir():
        raise ConfigError(f"--verdict: {run} is no run folder; name the folder that `robust eval` wrote")
    return Verdict.load(run)


def _show(found: dict[str, Any], subject: options.Subject, out: Path | None) -> None:
    from rich import box
    from rich.table import Table

    told = found["certificate"]
    word = "estimated" if told["kind"] == "estimate" else "certified"
    table = Table(
        title=f"{told['method']} of {subject.model} on {subject.data}: {found['n']} samples",
        title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    beside = found.get("verdict")
    for head in (f"{found['norm']} radius", word, "95 % interval", *(["not broken"] if beside else [])):
        table.add_column(head)
    curve = dict(beside["curve"]) if beside else {}
    for row in found["certified_accuracy"]:
        low, high = (options.percent(value) for value in row["interval"])
        cells = [options.radius(row["radius"]), options.percent(row["accuracy"]), f"{low} to {high}"]
        known = curve.get(row["radius"])
        table.add_row(*cells, *([options.percent(known) if known is not None else ""] if beside else []))
    options.print_table(table)
    sure = f", confidence {told['confidence']:g} per sample" if "confidence" in told else ""
    print(f"{told['guarantee']}{sure}")
    print(f"voted     {'; '.join(found['voters'])}")
    if "mean_votes" in found:
        print(f"votes     {found['mean_votes']:,.0f} a sample, {found['abstained']} abstained")
    if beside:
        print(f"verdict   {beside['suite']} on {beside['model']}")
    if out is not None:
        print(f"saved to  {out}")
