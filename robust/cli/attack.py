"""`robust attack NAME [MODEL]`: one attack on one model, with its success rate, distances and cost."""

from __future__ import annotations

import json
import math
import tomllib
import typing
import warnings
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robust.cli import options, universal
from robust.cli.progress import Meter, duration
from robust.errors import ConfigError, RobustError, ThreatError
from robust.registry import room

if TYPE_CHECKING:
    from torch import Tensor

    from robust.classifier import Classifier
    from robust.data import Data
    from robust.track import TrackMode

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
    """

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
    as_json: options.Json = False,
) -> None:
    """Run one attack; report its success rate, the distances it needed and what it cost."""
    options.check_precision(precision)
    kind = room("attacks").load(name)
    extras = universal.Extras(train, size, width_mm, tuple(also or ()), tuple(photo or ()))
    if kind.universal:
        universal.run(
            name, kind, extras, settings or [], target=target, out=out, precision=precision, as_json=as_json,
            model=model, data=data, norm=norm, eps=eps, n=n, seed=seed, weights=weights, mean=mean, std=std,
            bounds=bounds, device=device, data_root=data_root,
        )  # fmt: skip
        return
    extras.refuse(name)
    subject = options.make_subject(
        model, data, norm, eps, n=n, seed=seed, weights=weights, mean=mean, std=std, bounds=bounds,
        device=device, data_root=data_root,
    )  # fmt: skip
    attack = build(name, kind, settings or [], subject)
    options.check_writable(out)
    with warnings.catch_warnings(), Meter(name, quiet=as_json) as meter:
        options.hush()
        classifier, samples = subject.load()
        found = run(attack, classifier, samples, target=target, seed=seed, precision=precision, meter=meter)
    summary = summarise(name, attack, found, classifier, subject)
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
    chosen: dict[str, Any] = vars(from_mapping(parse_settings(settings), plain, name="--set"))
    return chosen


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``["steps=20", "loss=margin"]`` as a mapping: values as TOML writes them, any other text as it is."""
    table: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = (part.strip() for part in setting.partition("="))
        if not equals or not key or not text:
            raise ConfigError(f"--set: {setting!r} is not KEY=VALUE; write it like steps=20")
        if key in table:
            raise ConfigError(f"--set: {key} is given twice")
        try:
            table[key] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            table[key] = text
    return table


def run(
    attack: Any,
    classifier: Classifier,
    data: Data,
    *,
    target: str | None,
    seed: int,
    precision: str,
    meter: Meter,
) -> Found:
    """The attack on all samples, a chunk at a time; their places in the data key the randomness."""
    import torch

    from robust.cost import Cost
    from robust.decide import decide
    from robust.track import Curves

    total, cost, curves = len(data), Cost(), Curves()
    track: TrackMode | None = None if attack.knowledge == "white" else "best"
    examples = _examples(classifier, data) if target is not None and attack.knowledge == "decision" else {}
    parts: list[tuple[Tensor, ...]] = []
    for start in range(0, total, CHUNK):
        meter(start / total, f"{start} of {total} samples")
        rows = range(start, min(start + CHUNK, total))
        x, y = data.batch(rows)
        index = torch.tensor(rows)
        targets = None if target is None else _aim(target, classifier, x, y, seed, index)
        begin = None
        if targets is not None and examples:
            begin = torch.stack([examples.get(int(t), clean) for t, clean in zip(targets, x, strict=True)])
        result = attack.run(
            classifier,
            x,
            y,
            targets=targets,
            seed=seed,
            index=index,
            begin=begin,
            precision=precision,
            track=track,
        )
        if result.track is not None:
            curves.add(result.track)
        clean = decide(classifier, x, y, targets, index=index, seed=seed)
        after = decide(classifier, result.x_adv, y, index=index, seed=seed)
        standing = [decision.prediction.cpu() == y for decision in (clean, after)]
        parts.append((x, result.x_adv.cpu(), y, result.success.cpu(), ~clean.hit.cpu(), *standing))
        cost = cost + result.cost
    meter(1.0, "done")
    whole = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    found = Found(None, cost.to_dict(), *whole)
    if track is None:
        return found
    curve = curves.against_queries(_GRID, int(found.open.sum()))
    finite = {
        key: [value if math.isfinite(value) else None for value in column] for key, column in curve.items()
    }
    return replace(found, curve=finite)


def _aim(target: str, classifier: Classifier, x: Tensor, y: Tensor, seed: int, index: Tensor) -> Tensor:
    """(N,) the classes that `--target` means for these samples."""
    import torch

    from robust.targets import named_targets

    scores = torch.cat([classifier.logits(part) for part in x.split(64)]).cpu()
    if not target.lstrip("-").isdigit():
        try:
            return named_targets(target, scores, y, seed, index)
        except RobustError as error:
            raise ConfigError(f"--target: {error}") from None
    if not 0 <= int(target) < classifier.classes:
        raise ConfigError(
            f"--target: {target} is no class; the model has the classes 0 to {classifier.classes - 1}"
        )
    return torch.full_like(y, int(target))


def _examples(classifier: Classifier, data: Data) -> dict[int, Tensor]:
    """The first sample that the model gives each class: where targeted decision-based attacks start from."""
    found: dict[int, Tensor] = {}
    for start in range(0, len(data), CHUNK):
        x, _ = data.batch(range(start, min(start + CHUNK, len(data))))
        for part in x.split(64):
            for label, point in zip(classifier.logits(part).argmax(1).tolist(), part, strict=True):
                found.setdefault(label, point)
    return found


def summarise(
    name: str, attack: Any, found: Found, classifier: Classifier, subject: options.Subject
) -> dict[str, Any]:
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
        "warnings": list(classifier.warnings),
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
    title = f"{summary['attack']} on {summary['model']}, {summary['data']}, {summary['n']} samples"
    options.show(f"{title}, {threat['norm']} {options.radius(threat['eps'])}", rows)
    if summary["out"]:
        print(f"saved to  {summary['out']}")
