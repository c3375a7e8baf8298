"""`robust attack NAME [MODEL]`: one attack on one model, with its success rate, distances and cost."""

from __future__ import annotations

import json
import math
import time
import typing
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options, universal
from robust.cli import settings as options_of
from robust.cli.progress import Meter, duration
from robust.errors import ConfigError, RobustError, ThreatError
from robust.registry import room

if TYPE_CHECKING:
    from torch import Tensor

    from robust.classifier import Classifier
    from robust.cost import Cost
    from robust.data import Data
    from robust.oracle import Oracle
    from robust.track import Curves, TrackMode

_GRID = (
    0,
    10,
    20,
    50,
    100,
    200,
    500,
    1000,
    2000,
    5000,
    10_000,
    20_000,
    50_000,
)  # queries at which a curve is read
CHUNK = 256  # samples between two reports of progress; an outcome does not depend on it

Name = Annotated[str, typer.Argument(metavar="NAME", help="An attack's name; see `robust list attacks`.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A hyper-parameter, such as steps=20; may be repeated.",
        show_default=False,
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="LABEL",
        help="Reach this class instead of leaving the true one; or random, second or least-likely.",
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="PATH",
        help="Save the examples to this safetensors file; of a universal attack or a patch, this folder gets the "
        "report and what was learnt.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Found:
    """All samples after the attack, on the CPU.

    Attributes:
        curve: of a black-box attack, success and median distance against queries (`Curves.against_queries`).
        cost: model passes, queries and seconds by name.
        x, x_adv: (N, C, H, W) clean points and what the attack made of them.
        y: (N,) true labels.
        success: (N,) bool: the attack's goal is reached.
        open: (N,) bool: it was not reached on the clean point already.
        correct, standing: (N,) bool: the clean, the attacked point is classified correctly.
        oracle: where only answers are seen, which, and what was spent on what; warnings: doubts.
    """

    oracle: dict[str, Any] | None
    warnings: list[str]
    curve: dict[str, list[float | None]] | None
    cost: dict[str, float]
    x: Tensor
    x_adv: Tensor
    y: Tensor
    success: Tensor
    open: Tensor
    correct: Tensor
    standing: Tensor


def attack_model(
    name: Name,
    model: options.Model = None,
    data: options.DataName = None,
    norm: options.Norm = "linf",
    eps: options.Eps = None,
    settings: Settings = None,
    target: Target = None,
    n: options.Count = 1000,
    seed: options.Seed = 0,
    out: Out = None,
    train: universal.Train = None,
    size: universal.Size = None,
    width_mm: universal.WidthMm = None,
    also: universal.Also = None,
    photo: universal.Photo = None,
    weights: options.Weights = None,
    mean: options.Mean = None,
    std: options.Std = None,
    bounds: options.Bounds = "0,1",
    precision: options.Precision = "auto",
    device: options.Device = None,
    data_root: options.DataRoot = None,
    answers: options_of.Answers = None,
    budget: options_of.Budget = None,
    classes: options_of.Classes = None,
    endpoint: options_of.Endpoint = None,
    defense: options_of.Defenses = None,
    as_json: options.Json = False,
) -> None:
    """Run one attack; report its success rate, the distances it needed and what it cost."""
    options.check_precision(precision)
    kind = room("attacks").load(name)
    extras = universal.Extras(train, size, width_mm, tuple(also or ()), tuple(photo or ()))
    given: dict[str, Any] = {
        "model": model, "data": data, "norm": norm, "eps": eps, "n": n, "seed": seed, "weights": weights,
        "mean": mean, "std": std, "bounds": bounds, "device": device, "data_root": data_root, "defense": defense,
    }  # fmt: skip
    if kind.universal:
        if answers or budget or classes or endpoint:
            options_of.refuse_answers(name)
        universal.run(
            name, kind, extras, settings or [], target=target, out=out, precision=precision, as_json=as_json, **given
        )  # fmt: skip
        return
    extras.refuse(name)
    subject = options.make_subject(
        **given, answers=answers, budget=budget, classes=classes, endpoint=endpoint
    )
    if subject.deployed and kind.knowledge == "white":
        raise ConfigError(
            f"{name} needs gradients, and of {subject.model} only answers are seen; choose a black-box attack"
        )
    attack = build(name, kind, options_of.averaged(kind, settings or [], subject.defenses), subject)
    options.check_writable(out)
    with warnings.catch_warnings(), Meter(name, quiet=as_json) as meter:
        options.hush()
        victim, samples = subject.load()
        found = run(attack, victim, samples, target=target, seed=seed, precision=precision, meter=meter)
    _tell(summarise(name, attack, found, subject), found, out, as_json=as_json)


def _tell(summary: dict[str, Any], found: Found, out: Path | None, *, as_json: bool) -> None:
    """Stores and shows what came out."""
    if out is not None:
        summary["out"] = str(out)
        _save(out, found, summary)
    if as_json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        _show(summary)


def build(name: str, kind: Any, settings: Sequence[str], subject: options.Subject) -> Any:
    """The attack with its hyper-parameters; an unknown key, a wrong type or norm is one line."""
    if len(subject.eps) > 1:
        raise ConfigError("--eps: an attack takes one radius; `robust eval` takes a list")
    if subject.norm not in kind.norms:
        raise ThreatError(f"--norm: {name} has no {subject.norm} form; it knows {', '.join(kind.norms)}")
    return kind(threat=subject.threats()[0], **hyper_parameters(kind, settings))


def hyper_parameters(kind: Any, settings: Sequence[str]) -> dict[str, Any]:
    """An attack's fields but the threat, from ``KEY=VALUE``."""
    from robust.config import from_mapping

    hints = typing.get_type_hints(kind)
    # The threat has options of its own; what is left are the hyper-parameters, read as a configuration file's are.
    members = [(item.name, hints[item.name], copy(item)) for item in fields(kind) if item.name != "threat"]
    plain: type[Any] = make_dataclass(kind.__name__, members, kw_only=True)
    settings_table = options_of.parse_settings(settings, "--set")
    chosen: dict[str, Any] = vars(from_mapping(settings_table, plain, name="--set"))
    return chosen


def run(
    attack: Any,
    model: Classifier | Oracle,
    data: Data,
    *,
    target: str | None,
    seed: int,
    precision: str,
    meter: Meter,
) -> Found:
    """The attack on all samples, a chunk at a time; their places in the data key the randomness."""
    import torch

    from robust.cli.purse import purse_of
    from robust.decide import outcome
    from robust.track import Curves

    total, curves = len(data), Curves()
    track: TrackMode | None = None if attack.knowledge == "white" else "best"
    aimed = target is not None and attack.knowledge == "decision"
    purse = purse_of(model, total, aimed, attack.preparation())
    attack, cost = _prepare(attack, model, data, seed)
    examples = _examples(model, data) if aimed else {}
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, total, CHUNK):
        meter(start / total, f"{start} of {total} samples")
        rows = range(start, min(start + CHUNK, total))
        x, y = data.batch(rows)
        index = torch.tensor(rows)
        targets = None if target is None else _aim(target, model, x, y, seed, index)
        begin = None
        if targets is not None and examples:
            begin = torch.stack([examples.get(int(t), clean) for t, clean in zip(targets, x, strict=True)])
        with purse.share(len(x), total - rows.stop):
            result = attack.run(
                model, x, y, targets=targets, seed=seed, index=index, begin=begin, precision=precision, track=track
            )  # fmt: skip
        if result.track is not None:
            curves.add(result.track)
        purse.note(result.notes)
        clean = outcome(model, x, y, index, seed, targets)
        after = outcome(model, result.x_adv, y, index, seed)
        standing = [decision.prediction.cpu() == y for decision in (clean, after)]
        success = purse.confirmed(result.success.cpu(), after, targets)
        parts.append((x, result.x_adv.cpu(), y, success, ~clean.hit.cpu(), *standing))
        cost = cost + result.cost
    meter(1.0, "done")
    whole = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    found = Found(purse.facts(cost), purse.doubts(), None, purse.whole(cost).to_dict(), *whole)
    return found if track is None else replace(found, curve=_curve(curves, int(found.open.sum())))


def _curve(curves: Curves, total: int) -> dict[str, list[float | None]]:
    """Success and median distance of `total` samples against queries, as JSON can hold them."""
    columns = curves.against_queries(_GRID, total).items()
    return {key: [value if math.isfinite(value) else None for value in column] for key, column in columns}


def _prepare(attack: Any, model: Classifier | Oracle, data: Data, seed: int) -> tuple[Any, Cost]:
    """The attack with what it learns once, not for every chunk, and what that took."""
    from robust.cost import Cost

    begun, before = time.perf_counter(), model.cost + Cost()
    ready = attack.prepare(model, data, seed=seed)
    cost = model.cost - before
    cost.queries, cost.seconds = attack.preparation(), time.perf_counter() - begun
    return ready, cost


def _aim(target: str, model: Classifier | Oracle, x: Tensor, y: Tensor, seed: int, index: Tensor) -> Tensor:
    """(N,) the classes that `--target` means for these samples."""
    import torch

    from robust.targets import named_targets

    scores = _scores(target, model, x)
    if not target.lstrip("-").isdigit():
        try:
            return named_targets(target, scores, y, seed, index)
        except RobustError as error:
            raise ConfigError(f"--target: {error}") from None
    classes = scores.shape[1]
    if not 0 <= int(target) < classes:
        raise ConfigError(f"--target: {target} is no class; the model has the classes 0 to {classes - 1}")
    return torch.full_like(y, int(target))


def _scores(target: str, model: Classifier | Oracle, x: Tensor) -> Tensor:
    """(N, classes) clean scores, or zeros where nothing but their number is needed, or had."""
    import torch

    from robust.classifier import Classifier

    if isinstance(model, Classifier):
        return torch.cat([model.logits(part) for part in x.split(64)]).cpu()
    if target not in ("second", "least-likely") and model.known_classes is not None:
        return torch.zeros(len(x), model.known_classes)
    if model.answers == "labels":
        raise ConfigError(
            f"--target: {target} needs scores, and the model gives labels; choose a class or random"
        )
    return model.scores(x).cpu()


def _examples(model: Classifier | Oracle, data: Data) -> dict[int, Tensor]:
    """The first sample that the model gives each class: where targeted decision-based attacks start from."""
    from robust.classifier import Classifier

    found: dict[int, Tensor] = {}
    for start in range(0, len(data), CHUNK):
        x, _ = data.batch(range(start, min(start + CHUNK, len(data))))
        for part in x.split(64):
            labels = model.logits(part).argmax(1) if isinstance(model, Classifier) else model.labels(part)
            for label, point in zip(labels.tolist(), part, strict=True):
                found.setdefault(label, point)
    return found


def summarise(name: str, attack: Any, found: Found, subject: options.Subject) -> dict[str, Any]:
    """The numbers of the run as one JSON-ready object; distances are medians over the samples it broke."""
    from robust.threat import L2, Linf

    total, still_open = len(found.y), int(found.open.sum())
    broken = found.success & found.open
    changed, clean = found.x_adv[broken], found.x[broken]
    parameters = {item.name: getattr(attack, item.name) for item in fields(attack) if item.name != "threat"}
    return {
        "attack": name,
        "parameters": parameters,
        "model": subject.model,
        "defenses": [item.describe() for item in subject.defenses],
        "data": subject.data,
        "clean_accuracy": int(found.correct.sum()) / total,
        "robust_accuracy": int(found.standing.sum()) / total,
        "success_rate": int(broken.sum()) / still_open if still_open else None,
        "broken": int(broken.sum()),
        "attempted": still_open,
        "median_l2": _median(L2().distance(changed, clean)),
        "median_linf": _median(Linf().distance(changed, clean)),
        "n": total,
        "threat": attack.threat.describe(),
        "suite": name,
        "seed": subject.seed,
        "seconds": round(found.cost["seconds"], 3),
        "curve": found.curve,
        "cost": found.cost,
        "oracle": found.oracle,
        "warnings": list(found.warnings),
        "out": None,
    }


def _shown(curve: Mapping[str, Sequence[float | None]]) -> str:
    """Success at the numbers of queries up to where it no longer changes."""
    pairs = list(zip(curve["queries"], curve["success"], strict=True))
    kept = [pair for k, pair in enumerate(pairs) if k == 0 or pair[1] != pairs[k - 1][1]]
    return "  ".join(f"{int(queries or 0):,}: {options.percent(rate or 0.0)}" for queries, rate in kept)


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None


def _save(out: Path, found: Found, summary: Mapping[str, Any]) -> None:
    from robust.checkpoint import write_tensors

    out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"x": found.x, "x_adv": found.x_adv, "y": found.y, "success": found.success}
    write_tensors(out, tensors, {"format": "pt", "summary": json.dumps(summary)})


def _show(summary: Mapping[str, Any]) -> None:
    rate = summary["success_rate"]
    cost, threat = summary["cost"], summary["threat"]
    goal = f"{summary['broken']} of {summary['attempted']} samples"
    settings = " ".join(f"{key}={value}" for key, value in summary["parameters"].items())
    rows = [
        ("success rate", "nothing to attack" if rate is None else f"{options.percent(rate)}   {goal}"),
        ("clean accuracy", options.percent(summary["clean_accuracy"])),
        ("accuracy under it", options.percent(summary["robust_accuracy"])),
    ]
    if summary["median_l2"] is not None:
        rows.append(("median distance", f"l2 {summary['median_l2']:.4g}   linf {summary['median_linf']:.4g}"))
    if summary["curve"] is not None:
        rows.append(("by queries", _shown(summary["curve"])))
    counts = (f"{int(cost[key]):,} {key}" for key in ("forwards", "backwards", "queries") if cost[key])
    rows += [("cost", "  ".join([*counts, duration(cost["seconds"])])), ("settings", settings)]
    rows += [("doubt", line) for line in summary["warnings"]]
    behind = "".join(f" behind {item['name']}" for item in summary["defenses"])
    title = f"{summary['attack']} on {summary['model']}{behind}, {summary['data']}, {summary['n']} samples"
    options.show(f"{title}, {threat['norm']} {options.radius(threat['eps'])}", rows)
    if summary["out"]:
        print(f"saved to  {summary['out']}")
