"""`robust eval [MODEL]`: a robustness verdict, with its evidence and report in a run folder."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from robust.cli import options, settings
from robust.cli.interrupt import Resume, resumable
from robust.cli.progress import Meter, duration
from robust.errors import ConfigError, RunError
from robust.models.named import FORM, NamedModel, parse_model
from robust.registry import room

if TYPE_CHECKING:
    from robust.verdict import Verdict

RUNS = Path("runs")

Suite = Annotated[
    str | None,
    typer.Option(
        "--suite",
        metavar="SUITE",
        help="quick, standard, rand, score, decision, transfer, full, or a comma list of attacks. Default: standard; "
        "where only answers are seen, score, or decision if they are labels.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", metavar="RUN", help="The run folder. Default: a new one below runs/.", show_default=False
    ),
]
Surrogates = Annotated[
    list[str] | None,
    typer.Option(
        "--surrogate",
        metavar="MODEL",
        help=f"A model that suite transfer or full makes points on: {FORM}; may be repeated. Default: a substitute "
        "distilled from the model's answers.",
        show_default=False,
    ),
]


def evaluate_model(
    model: options.Model = None,
    data: options.DataName = None,
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    suite: Suite = None,
    n: options.Count = 1000,
    seed: options.Seed = 0,
    surrogates: Surrogates = None,
    out: Out = None,
    resume: Resume = False,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0,1",
    precision: options.Precision = "auto",
    device: options.Device = None,
    data_root: options.DataRoot = None,
    answers: settings.Answers = None,
    budget: settings.Budget = None,
    classes: settings.Classes = None,
    endpoint: settings.Endpoint = None,
    defense: settings.Defenses = None,
    as_json: options.Json = False,
) -> None:
    """Measure how robust a model is: clean and robust accuracy, with evidence that others can check."""
    options.check_precision(precision)
    subject = options.make_subject(
        model, data, norm, eps, n=n, seed=seed, weights=weights, mean=mean, std=std, bounds=bounds,
        device=device, data_root=data_root, answers=answers, budget=budget, classes=classes, endpoint=endpoint,
        defense=defense,
    )  # fmt: skip
    suite = suite or (subject.black_box.suite() if subject.deployed else "standard")
    given = [parse_model(text) for text in surrogates or []]
    _check_suite(suite, subject, surrogates=bool(given))
    folder = out or _default_out(subject, suite, resume)
    options.check_writable(folder)
    with resumable(folder):
        verdict = _evaluate(subject, suite, folder, precision, given, resume=resume, quiet=as_json)
    if as_json:
        print(json.dumps(verdict.summary(), ensure_ascii=False, default=str))
    else:
        _show(verdict, subject, folder)


def _evaluate(
    subject: options.Subject,
    suite: str,
    folder: Path,
    precision: str,
    surrogates: Sequence[NamedModel],
    *,
    resume: bool,
    quiet: bool,
) -> Verdict:
    from robust.evaluate import evaluate

    with warnings.catch_warnings(), Meter("loading", quiet=quiet) as meter:
        options.hush()
        model, data = subject.load()
        return evaluate(
            model,
            data,
            threat=subject.threats(),
            suite=suite,
            seed=subject.seed,
            out=folder,
            resume=resume,
            precision=cast("Any", precision),
            surrogates=[
                named.load(bounds=model.bounds, device=model.device, classes=len(data.classes) or None)
                for named in surrogates
            ],
            progress=meter,
        )


def _check_suite(suite: str, subject: options.Subject, *, surrogates: bool) -> None:
    """An unknown suite or attack, or one that norm or model do not allow, is refused before a model is loaded."""
    from robust.suites import stages

    planned = stages(suite, subject.norm, subject.deployed)[1]
    if surrogates and not any(
        room("attacks").load(stage.attack).knowledge == "transfer" for stage in planned
    ):
        raise ConfigError(f"--surrogate: suite {suite} uses none; they are for suite transfer or full")


def _default_out(subject: options.Subject, suite: str, resume: bool) -> Path:
    """A new folder below runs/ that is named after the run; with `resume` the newest one of that name."""
    shields = [item.name for item in subject.defenses]
    parts = (
        last(subject.model),
        *shields,
        last(subject.data),
        subject.norm,
        slug(subject.eps_text),
        slug(suite),
    )
    return new_folder(f"{'-'.join(parts)}-seed{subject.seed}", resume)


def new_folder(name: str, resume: bool) -> Path:
    """A folder below runs/ of that name, numbered where it is taken; with `resume` the newest one there is."""
    base = RUNS / name
    taken = [base] if base.exists() else []
    while taken and (following := base.with_name(f"{base.name}-{len(taken) + 1}")).exists():
        taken.append(following)
    if resume:
        if not taken:
            raise RunError(f"--resume: there is no run {base} to go on with; name its folder with --out")
        return taken[-1]
    return base.with_name(f"{base.name}-{len(taken) + 1}") if taken else base


def slug(text: str) -> str:
    """Text in letters that every file system takes."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:60]


def last(spec: str) -> str:
    """The telling end of a specification: ``zoo:digits`` is digits, ``imagefolder:a/b`` is b."""
    return slug((spec.partition(":")[2] or spec).rstrip("/").rpartition("/")[2])


def _show(verdict: Verdict, subject: options.Subject, folder: Path) -> None:
    summary = verdict.summary()
    rows = [
        ("clean accuracy", _with_interval(summary["clean_accuracy"], summary["n"])),
        ("robust accuracy", _with_interval(summary["robust_accuracy"], summary["n"])),
    ]
    if len(verdict.curve) > 1:
        curve = "   ".join(f"{options.radius(e)}: {options.percent(a)}" for e, a in verdict.curve)
        rows.append(("curve", curve))
    rows += [*_defended(summary), ("broken by", _broken_by(verdict)), ("cost", _cost(verdict.cost))]
    rows += [("doubt", line) for line in verdict.warnings]
    threat = f"{subject.norm} {options.radius(subject.eps[-1])}"
    options.show(
        f"{subject.model} on {subject.data}: {threat}, suite {verdict.suite}, {summary['n']} samples", rows
    )
    # Outside the table, whose folds would break a path in two.
    print(f"evidence  {folder}\nreport    {folder / 'report.html'}")
    if subject.model == options.DEFAULT_MODEL:
        print("its adversarially trained sister: robust eval zoo:digits-at")


def _defended(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The defences, how they were attacked, and what attacks that do not know of them would have claimed."""
    beside = summary["non_adaptive"]
    if beside is None:
        return []
    from robust.report import told_defense

    shown = "   ".join(
        f"{kind} {options.percent(beside[kind])}" for kind in ("replay", "naive") if kind in beside
    )
    overstated = f"overstated by {100 * beside['overstated']:.1f} points"
    return [
        *(("behind", told_defense(item)) for item in summary["defenses"]),
        ("not adaptive", f"{shown}   {overstated}   ({beside['attack']}, {beside['steps']} steps)"),
    ]


def _with_interval(accuracy: float, n: int) -> str:
    from robust.report import clopper_pearson

    low, high = clopper_pearson(round(accuracy * n), n)
    return f"{options.percent(accuracy)}   95 % interval {options.percent(low)} to {options.percent(high)}"


def _broken_by(verdict: Verdict) -> str:
    counts: dict[str, int] = {}
    for name in verdict.broken_by:
        if name is not None:
            counts[name] = counts.get(name, 0) + 1
    return "   ".join(f"{name} {count}" for name, count in counts.items()) or "none"


def _cost(cost: Any) -> str:
    counts = (f"{int(cost[key]):,} {key}" for key in ("forwards", "backwards", "queries") if cost.get(key))
    return "   ".join([*counts, duration(cost.get("seconds", 0.0))])
