"""The report of a verdict: one self-contained HTML page that anybody can open, read and check."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust import report_figures as figures
from robust.adaptive import KINDS
from robust.digest import write_atomic
from robust.journal import PREPARED
from robust.rows import Source, as_source

if TYPE_CHECKING:
    from robust.verdict import Verdict

GALLERY = 12
_TABLE_CLASSES = 20
_ELSEWHERE = (
    "stages",
    "warnings",
    "cost",
    "results",
    "defenses",
    "plan",
    "command",
)  # parts of the manifest shown elsewhere


def write_report(
    verdict: Verdict,
    x: Any,
    y: Tensor | None,
    clf: Any,
    path: str | Path,
    *,
    classes: Sequence[str] | None = None,
) -> Path:
    """Write `report.html`: summary, curve, gallery, confusion, costs, doubts and how to verify, in one file.

    Args:
        verdict: the outcome to show.
        x, y: the data, as given to `evaluate`.
        clf: the model; nothing is asked of it, since the verdict holds its answers.
        path: where to write; the file appears whole or not at all.
        classes: class names; default: the data's, or the label numbers.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, count=count, eps=figures.eps_text)
    page = environment.get_template("report.html.j2").render(
        _context(verdict, x if hasattr(x, "batch") else as_source(x, y), classes)
    )
    target = Path(path)
    write_atomic(target, page.encode())
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
    """A fraction as people read it, with one decimal and a space that does not break: ``91.2 %``."""
    return f"{100 * fraction:.1f}\u00a0%"


def count(value: float) -> str:
    """A count with thousands apart, or seconds with one decimal."""
    return f"{value:,.1f}" if isinstance(value, float) and not value.is_integer() else f"{int(value):,}"


def told_defense(item: Mapping[str, Any]) -> str:
    """A defence of a manifest in words: name, parameters, and how it was attacked."""
    parameters = ", ".join(f"{key}={value}" for key, value in item["parameters"].items())
    ways = [way for way, flag in (("BPDA", "bpda"), ("EOT", "randomised")) if item[flag]]
    return f"{item['name']}({parameters}), attacked by {' + '.join(ways) or 'its own gradient'}"


@dataclass(frozen=True)
class Step:
    """One row of the waterfall: who took how many samples, and what stood before and after."""

    name: str
    kind: str
    before: int
    after: int


def _context(verdict: Verdict, source: Source, classes: Sequence[str] | None) -> dict[str, Any]:
    manifest = verdict.manifest
    names = _class_names(verdict, classes or manifest["data"]["classes"])
    total = len(verdict)
    correct, robust = int(verdict.correct.sum()), int(verdict.robust.sum())
    points = _points(verdict, total)
    bound = figures.bound_from_distances(verdict.correct, verdict.distance)
    chance = 1 / max(manifest["model"]["classes"], 2)
    return {
        "model": manifest["model"]["name"],
        "data": manifest["data"]["name"],
        "norm": verdict.threat.norm,
        "eps": verdict.curve[-1][0],
        "suite": verdict.suite.replace(",", ", "),
        "total": total,
        "correct": correct,
        "robust": robust,
        "clean": _with_interval(correct, total),
        "standing": _with_interval(robust, total),
        "steps": _waterfall(verdict, total),
        "points": points,
        "curve": figures.curve_svg(points, bound, norm=verdict.threat.norm, chance=chance),
        "chance": chance,
        "distances": _distances(verdict),
        "gallery": _gallery(verdict, source, names),
        "broken": correct - robust,
        **_confusion(verdict, names),
        "defenses": [told_defense(item) for item in manifest.get("defenses", [])],
        "beside": verdict.non_adaptive,
        "stages": manifest["stages"],
        "cost": verdict.cost,
        "warnings": list(verdict.warnings),
        "facts": _facts(manifest),
        "out": str(verdict.out) if verdict.out else None,
        "seed": verdict.seed,
        "command": _command(manifest),
        "manifest": json.dumps(manifest, indent=2, ensure_ascii=False),
    }


def _worst(verdict: Verdict) -> Tensor:
    """(N,) the prediction on the worst input found: the example's, or the clean point's where none was found."""
    broken = torch.tensor([by is not None for by in verdict.broken_by], dtype=torch.bool)
    return torch.where(broken, verdict.adversarial_predictions, verdict.clean_predictions)


def _class_names(verdict: Verdict, known: Sequence[str]) -> tuple[str, ...]:
    """A name for every label that occurs; labels beyond the known names are called by their number."""
    highest = int(torch.cat([verdict.labels, verdict.clean_predictions, _worst(verdict)]).max())
    return (*known, *(str(label) for label in range(len(known), highest + 1)))


def _command(manifest: Mapping[str, Any]) -> str | None:
    """The command line that made the verdict, if it was one of ours."""
    program, *arguments = manifest["command"] or [""]
    if not arguments or Path(program).name not in ("robust", "__main__.py"):
        return None
    return shlex.join(["robust", *(part for part in arguments if part != "--resume")])


def _called(names: Sequence[str], label: int) -> str:
    """A prediction's name; -1 stands for an answer that was no number."""
    return names[label] if label >= 0 else "NaN"


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
        if name in KINDS.values() and not fallen:
            continue  # it stands beside the suite, and added nothing to it
        steps.append(Step(name, "broken", left, left - fallen))
        left -= fallen
    return [*steps, Step("robust", "robust", left, 0)]


def _attack_order(verdict: Verdict) -> list[str]:
    return list(
        dict.fromkeys(
            stage["attack"]
            for stage in verdict.manifest["stages"]
            if stage["attack"] not in ("clean", PREPARED)
        )
    )


def _distances(verdict: Verdict) -> dict[str, float] | None:
    found = verdict.distance[torch.isfinite(verdict.distance)].double()
    if not len(found):
        return None
    return {"least": float(found.min()), "median": float(found.median()), "most": float(found.max())}


def _facts(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions of the run as (name, value), nested entries joined by dots, long lists left to the raw view."""
    facts: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
            facts.append((prefix, ", ".join(map(_fact, value[:12])) + (", ..." if len(value) > 12 else "")))
        elif isinstance(value, (str, int, float)):
            facts.append((prefix, _fact(value)))

    walk("", {key: value for key, value in manifest.items() if key not in _ELSEWHERE})
    return facts


def _fact(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _gallery(verdict: Verdict, source: Source, names: Sequence[str]) -> list[dict[str, Any]]:
    """Up to `GALLERY` broken samples, taken from every attack in turn, as clean, perturbation and adversarial."""
    rows = _chosen(verdict.broken_by)
    if not rows:
        return []
    clean = source.batch(rows)[0].detach().cpu().float()
    place = {int(row): i for i, row in enumerate(verdict.adversarial_index)}
    return [
        _card(verdict, row, clean[i], verdict.adversarial[place[row]], names) for i, row in enumerate(rows)
    ]


def _card(
    verdict: Verdict, row: int, clean: Tensor, adversarial: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    low, high = verdict.manifest["model"]["bounds"]
    change, factor = figures.magnified(clean, adversarial, high - low)
    samples = verdict.samples
    # An oracle may give labels only, so the verdict has no confidences of it.
    shown = not verdict.manifest["model"]["oracle"]
    return {
        "row": row,
        "true": names[samples.y[row]],
        "was": _called(names, samples.prediction[row]),
        "now": _called(names, samples.adversarial_prediction[row]),
        "was_confidence": samples.confidence[row] if shown else None,
        "now_confidence": samples.adversarial_confidence[row] if shown else None,
        "by": samples.broken_by[row],
        "distance": samples.distance[row],
        "factor": factor,
        "images": [figures.png((image - low) / (high - low)) for image in (clean, adversarial)],
        "change": figures.png(change),
        "pixelated": max(clean.shape[1:]) <= 96,
    }


def _chosen(broken_by: Sequence[str | None]) -> list[int]:
    queues: dict[str, list[int]] = {}
    for row, by in enumerate(broken_by):
        if by is not None:
            queues.setdefault(by, []).append(row)
    rows: list[int] = []
    while len(rows) < GALLERY and any(queues.values()):
        rows += [queue.pop(0) for queue in queues.values() if queue]
    return sorted(rows[:GALLERY])


def _confusion(verdict: Verdict, names: Sequence[str]) -> dict[str, Any]:
    """True label against the prediction, clean and on the worst input found; for many classes the commonest pairs."""
    y, clean, worst = verdict.labels, verdict.clean_predictions, _worst(verdict)
    columns = [*range(len(names)), *([-1] if min(int(worst.min()), int(clean.min())) < 0 else [])]
    common = sorted(
        ((k, t, p) for (t, p), k in _cells(y, worst).items() if t != p), key=lambda row: (-row[0], row[1:])
    )
    few = len(names) <= _TABLE_CLASSES
    titles = (("Clean inputs", clean), ("Worst inputs found", worst))
    return {
        "matrices": [(title, _matrix(y, p, names, columns)) for title, p in titles] if few else [],
        "swaps": [{"true": names[t], "now": _called(names, p), "count": k} for k, t, p in common[:15]],
        "names": [_called(names, p) for p in columns],
        "short_names": all(len(name) <= 3 for name in names),
    }


def _cells(y: Tensor, predictions: Tensor) -> dict[tuple[int, int], int]:
    pairs, counts = torch.unique(torch.stack([y, predictions]), dim=1, return_counts=True)
    return {(t, p): int(k) for (t, p), k in zip(pairs.T.tolist(), counts, strict=True)}


def _matrix(
    y: Tensor, predictions: Tensor, names: Sequence[str], columns: Sequence[int]
) -> list[dict[str, Any]]:
    cells = _cells(y, predictions)
    rows = [[cells.get((t, p), 0) for p in columns] for t in range(len(names))]
    return [{"name": name, "counts": row, "total": sum(row)} for name, row in zip(names, rows, strict=True)]
