"""The report of a verdict: one self-contained HTML page that anybody can open, read and check."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust import report_figures as figures

if TYPE_CHECKING:
    from robust.data import Data
    from robust.verdict import Verdict

GALLERY = 12
_TABLE_CLASSES = 20
_COUNTS = ("forwards", "backwards", "queries", "seconds")


def write_report(
    verdict: Verdict,
    x: Tensor | Data,
    y: Tensor,
    clf: Any,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write `report.html`: summary, curve, gallery, confusion, costs, doubts and how to verify, in one file.

    Args:
        verdict: the outcome to show.
        x: the clean inputs (N, C, H, W) in the model's box, or the data that holds them.
        y: true labels (N,).
        clf: the model, for the gallery's confidences; an object without `logits` (an oracle) or None leaves them out.
        path: where to write; the file appears whole or not at all.
        classes: class names; default: the data's, or the label numbers.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, count=count, eps=figures.eps_text)
    page = environment.get_template("report.html.j2").render(_context(verdict, x, y, clf, classes))
    target = Path(path)
    unfinished = target.with_name(target.name + ".part")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, target)
    return target


def clopper_pearson(successes: int, total: int, level: float = 0.95) -> tuple[float, float]:
    """The exact binomial interval (Clopper and Pearson 1934) for a fraction; (0, 1) when there is no trial.

    Args:
        successes: how many of `total` trials succeeded.
        total: trials, each an independent draw.
        level: coverage of the two-sided interval, at least this for every true fraction.
    """
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, total - successes + 1, tail))
    high = 1.0 if successes == total else float(betaincinv(successes + 1, total - successes, 1 - tail))
    return low, high


def percent(fraction: float) -> str:
    """A fraction as people read it, with one decimal: ``91.2 %``."""
    return f"{100 * fraction:.1f} %"


def count(value: float) -> str:
    """A count with thousands apart, or seconds with one decimal."""
    return f"{value:,.1f}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"


@dataclass(frozen=True)
class Step:
    """One row of the waterfall: who took how many samples, and what stood before and after."""

    name: str
    kind: str
    before: int
    after: int


def _context(
    verdict: Verdict, x: Tensor | Data, y: Tensor, clf: Any, classes: Sequence[str] | None
) -> dict[str, Any]:
    labels = y.detach().cpu().long()
    names = _class_names(verdict, x, labels, classes)
    total = len(labels)
    correct, robust = int(verdict.correct.sum()), int(verdict.robust.sum())
    threat = verdict.threat
    points = _points(verdict, total)
    bound = figures.bound_from_distances(verdict.correct.cpu(), verdict.distance.cpu())
    manifest: Mapping[str, Any] = verdict.manifest
    return {
        "model": _name(manifest, "model", getattr(clf, "name", None)),
        "data": _name(manifest, "data", getattr(x, "name", None)),
        "norm": threat.norm,
        "eps": _eps(threat),
        "suite": _suite(verdict.suite),
        "total": total,
        "correct": correct,
        "robust": robust,
        "clean": _with_interval(correct, total),
        "standing": _with_interval(robust, total),
        "steps": _waterfall(verdict, total),
        "points": points,
        "curve": figures.curve_svg(points, bound, norm=threat.norm, chance=1 / max(len(names), 2)),
        "chance": 1 / max(len(names), 2),
        "distances": _distances(verdict),
        "gallery": _gallery(verdict, x, labels, clf, names),
        "broken": sum(by is not None for by in verdict.broken_by),
        **_confusion(verdict, labels, names),
        "stages": _stages(manifest),
        "cost": {key: verdict.cost.get(key, 0) for key in _COUNTS},
        "warnings": list(verdict.warnings),
        "facts": _facts(manifest),
        "out": str(verdict.out) if verdict.out else None,
        "seed": manifest.get("seed"),
        "manifest": json.dumps(manifest, indent=2, default=str, ensure_ascii=False),
    }


def _class_names(
    verdict: Verdict, x: Tensor | Data, y: Tensor, classes: Sequence[str] | None
) -> tuple[str, ...]:
    """A name for every label that occurs; labels beyond the given names are called by their number."""
    known = tuple(classes or getattr(x, "classes", None) or ())
    seen = torch.cat([y, verdict.clean_predictions.cpu().long(), verdict.adversarial_predictions.cpu().long()])
    highest = int(seen.max()) + 1 if len(seen) else 0
    return known + tuple(str(label) for label in range(len(known), highest))


def _called(names: Sequence[str], label: int) -> str:
    """A prediction's name; -1 stands for an answer that was no number."""
    return names[label] if label >= 0 else "NaN"


def _name(manifest: Mapping[str, Any], key: str, fallback: str | None) -> str:
    entry = manifest.get(key)
    if isinstance(entry, Mapping):
        entry = entry.get("name") or entry.get("spec")
    return str(entry or fallback or "a " + key)


def _suite(suite: str | Sequence[str]) -> str:
    return suite if isinstance(suite, str) else ", ".join(suite)


def _eps(threat: Any) -> float:
    return float(torch.as_tensor(threat.eps).double().max())


def _with_interval(successes: int, total: int) -> dict[str, float]:
    low, high = clopper_pearson(successes, total)
    return {"value": successes / max(total, 1), "low": low, "high": high}


def _points(verdict: Verdict, total: int) -> list[figures.Point]:
    measured = [(0.0, verdict.clean_accuracy), *sorted(verdict.curve)]
    return [
        figures.Point(eps, accuracy, *clopper_pearson(round(accuracy * total), total))
        for eps, accuracy in measured
    ]


def _waterfall(verdict: Verdict, total: int) -> list[Step]:
    """From all samples to the robust ones, attack by attack in the order in which they ran."""
    left = int(verdict.correct.sum())
    steps = [Step("wrong without an attack", "wrong", total, left)] if left < total else []
    for name in _attack_order(verdict):
        fallen = sum(by == name for by in verdict.broken_by)
        steps.append(Step(name, "broken", left, left - fallen))
        left -= fallen
    return [*steps, Step("robust", "robust", left, 0)]


def _attack_order(verdict: Verdict) -> list[str]:
    ran = [str(stage["attack"]) for stage in verdict.manifest.get("stages", ())]
    return list(dict.fromkeys([*ran, *(by for by in verdict.broken_by if by is not None)]))


def _distances(verdict: Verdict) -> dict[str, float] | None:
    found = verdict.distance[torch.isfinite(verdict.distance)].double()
    if not len(found):
        return None
    return {"least": float(found.min()), "median": float(found.median()), "most": float(found.max())}


def _stages(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for stage in manifest.get("stages", ()):
        cost = stage.get("cost", {})
        rows.append({**stage, "cost": {key: cost.get(key, 0) for key in _COUNTS}})
    return rows


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions of the run as (name, value), nested entries joined by dots, long lists left to the raw view."""
    facts: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, (str, int, float, bool)) and value != "":
            facts.append((prefix, str(value)))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(v, (str, int, float)) for v in value):
            facts.append((prefix, ", ".join(map(str, value[:12]))))

    walk("", {key: value for key, value in manifest.items() if key not in ("stages", "warnings", "cost")})
    return facts


def _gallery(
    verdict: Verdict, x: Tensor | Data, y: Tensor, clf: Any, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Up to `GALLERY` broken samples, taken from every attack in turn, as clean, perturbation and adversarial."""
    rows = _chosen(verdict.broken_by)
    if not rows:
        return []
    clean = torch.stack([_image(x, row) for row in rows])
    adversarial = verdict.adversarial[rows].detach().cpu().float()
    before, after = _confidence(clf, clean, y, rows), _confidence(clf, adversarial, y, rows)
    low, high = (float(value) for value in getattr(clf, "bounds", (0.0, 1.0)))
    cards = []
    for i, row in enumerate(rows):
        change, factor = figures.magnified(clean[i], adversarial[i], high - low)
        was, now = int(verdict.clean_predictions[row]), int(verdict.adversarial_predictions[row])
        cards.append(
            {
                "row": row,
                "true": names[int(y[row])],
                "was": _called(names, was),
                "now": _called(names, now),
                "was_confidence": before[i],
                "now_confidence": after[i],
                "by": verdict.broken_by[row],
                "distance": float(verdict.distance[row]),
                "factor": factor,
                "images": [
                    figures.png((clean[i] - low) / (high - low)),
                    figures.png(change),
                    figures.png((adversarial[i] - low) / (high - low)),
                ],
                "pixelated": max(clean.shape[2:]) <= 96,
            }
        )
    return cards


def _chosen(broken_by: Sequence[str | None]) -> list[int]:
    queues: dict[str, list[int]] = {}
    for row, by in enumerate(broken_by):
        if by is not None:
            queues.setdefault(by, []).append(row)
    rows: list[int] = []
    while len(rows) < GALLERY and any(queues.values()):
        rows += [queue.pop(0) for queue in queues.values() if queue]
    return sorted(rows[:GALLERY])


def _image(x: Tensor | Data, row: int) -> Tensor:
    return x[row].detach().cpu().float() if isinstance(x, Tensor) else x[row][0].float()


def _confidence(clf: Any, x: Tensor, y: Tensor, rows: Sequence[int]) -> list[float | None]:
    """The model's probability for its own prediction; None for a model that shows no probabilities."""
    from robust.classifier import Classifier
    from robust.decide import decide

    if not isinstance(clf, Classifier):
        return [None] * len(rows)
    decision = decide(clf, x, y[rows], index=torch.tensor(rows))
    return [float(value) for value in decision.confidence]


def _confusion(verdict: Verdict, y: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """True label against the worst prediction found; a full table for few classes, the commonest pairs for many."""
    worst = verdict.adversarial_predictions.cpu().long()
    columns = [*range(len(names)), *([-1] if bool((worst < 0).any()) else [])]
    pairs, counts = torch.unique(torch.stack([y, worst]), dim=1, return_counts=True)
    cells = {(int(t), int(p)): int(k) for (t, p), k in zip(pairs.T.tolist(), counts, strict=True)}
    common = sorted(((k, t, p) for (t, p), k in cells.items() if t != p), key=lambda row: (-row[0], row[1:]))
    swaps = [{"true": names[t], "now": _called(names, p), "count": k} for k, t, p in common[:15]]
    table = None
    if len(names) <= _TABLE_CLASSES:
        rows = [[cells.get((t, p), 0) for p in columns] for t in range(len(names))]
        table = [{"name": name, "counts": row, "total": sum(row)} for name, row in zip(names, rows, strict=True)]
    return {
        "confusion": table,
        "swaps": swaps,
        "names": [_called(names, p) for p in columns],
        "short_names": all(len(name) <= 3 for name in names),
    }
