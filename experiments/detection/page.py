"""The README's parts that are made from records: ``python -m robust.experiments.detection.page [--write]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust.detection import AWARE
from robust.detection_figure import figure
from robust.digest import read_json, write_atomic
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.pages import Page

FOLDER = Path(__file__).parent
README = FOLDER / "README.md"
SUBJECTS = ("mnist", "cifar10")
WORDS = {"falls": "**falls**", "leans": "leans", "stands": "stands", "untried": "untried"}


def records() -> dict[str, dict[str, Any]]:
    """Those that there are, by subject."""
    places = {name: FOLDER / f"{name}.json" for name in SUBJECTS}
    return {name: read_json(place) for name, place in places.items() if place.exists()}


def drawn(record: Mapping[str, Any]) -> bytes:
    """The record's curves as an SVG."""
    rows = []
    for row in record["detectors"]:
        attacks = {
            name: {**told, "curve": [list(pair) for pair in zip(record["grid"], told["curve"], strict=True)]}
            for name, told in row["attacks"].items()
            if told["curve"] and not row["detector"]["stateful"]
        }
        rows.append({**row, "attacks": attacks})
    return figure({"detectors": [row for row in rows if row["attacks"]]})


def conclusion(record: Mapping[str, Any]) -> str:
    """Which detectors fall to an attacker who knows them, in words made from the numbers."""
    found: dict[str, list[str]] = {word: [] for word in WORDS}
    for row in record["detectors"]:
        best = max(
            (told["success"]["fraction"], name)
            for name, told in row["attacks"].items()
            if name == AWARE or row["detector"]["stateful"]
        )
        by = f" by {best[1]}" if row["detector"]["stateful"] else ""
        found[row["verdict"]].append(f"`{row['name']}` ({_percent(best[0])} past it{by})")
    lines = []
    if found["falls"]:
        lines.append(f"Fall to an attacker who knows them: {', '.join(found['falls'])}.")
    if found["leans"]:
        lines.append(f"Let such an attacker through now and then: {', '.join(found['leans'])}.")
    if found["stands"]:
        lines.append(f"Stood against this one attack, which proves nothing: {', '.join(found['stands'])}.")
    return " ".join(lines)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _share(told: Mapping[str, Any]) -> str:
    low, high = told["interval"]
    return f"{_percent(told['fraction'])} ({100 * low:.1f} to {100 * high:.1f})"


def _told(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def single(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of detectors that look at single inputs."""
    heads = ["detector", "attack", "wrong class", "AUC (95 %)", "TPR at 1 %", "at 5 %", "attacker's success"]
    lines = []
    for row in rows:
        for name, told in row["attacks"].items():
            low, high = told["interval"] or (0.0, 1.0)
            lines.append(
                [
                    f"{row['name']}, {WORDS[row['verdict']]}" if name == AWARE else row["name"],
                    name,
                    f"{told['broken']} of {told['n']}",
                    "" if told["auc"] is None else f"{told['auc']:.3f} ({low:.3f} to {high:.3f})",
                    "" if told["tpr"] is None else _percent(told["tpr"]["0.01"]),
                    "" if told["tpr"] is None else _percent(told["tpr"]["0.05"]),
                    _share(told["success"]),
                ]
            )
    return markdown(heads, lines)


def watching(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of the detector that watches queries."""
    heads = ["attack", "wrong class", "queries", "detected", "first after", "detections", "AUC"]
    heads.append("attacker's success")
    lines = [
        [
            name,
            f"{told['broken']} of {told['n']}",
            f"{told['mean_queries']:.0f}",
            f"{told['detected']['count']} of {told['n']}",
            "" if told["first_detection"] is None else f"{told['first_detection']:g}",
            f"{told['mean_detections']:.1f}",
            "" if told.get("auc") is None else f"{told['auc']:.3f}",
            _share(told["success"]),
        ]
        for row in rows
        for name, told in row["attacks"].items()
    ]
    return markdown(heads, lines)


def flagged(rows: Sequence[Mapping[str, Any]]) -> str:
    """What each detector flags of clean images, and its parameters."""
    heads = ["detector", "parameters", "attacked by", "asked for", "clean images flagged"]
    lines = [
        [
            row["name"],
            ", ".join(f"{key}={_told(value)}" for key, value in row["detector"]["parameters"].items()),
            row["attacked_by"],
            f"{100 * row['detector']['fpr']:g} %",
            _share(row["clean_flagged"]),
        ]
        for row in rows
    ]
    return markdown(heads, lines)


def section() -> str:
    """All that the records say."""
    return "\n\n".join(_subject(name, record) for name, record in records().items()) or "No record yet."


def _subject(name: str, record: Mapping[str, Any]) -> str:
    rows, n = record["detectors"], record["samples"]
    looking = [row for row in rows if not row["detector"]["stateful"]]
    watchers = [row for row in rows if row["detector"]["stateful"]]
    attacks = "; ".join(
        f"`{attack}` ({', '.join(f'{key}={value:g}' for key, value in settings.items())})"
        for attack, settings in record["attacks"].items()
    )
    eps = record["threat"]["eps"]
    title = {"mnist": "MNIST, LeNet5", "cifar10": "CIFAR-10, ResNet-20"}[name]
    told = [
        f"## {title}",
        conclusion(record),
        f"![ROC curves]({name}.svg)",
        single(looking),
    ]
    if watchers:
        told += [
            f"`similarity`, {record['accounts']} images, each attacked from an account of its own with at most "
            f"{record['queries']} queries (linf {eps:.4g}):",
            watching(watchers),
        ]
    told += [
        flagged(rows),
        f"{n['test']:,} test images, of which the model is right on {_percent(record['clean_accuracy'])}; thresholds "
        f"from {n['held_out']:,} others, learnt from {n['learn']:,} training images. Attacks: {attacks}; linf "
        f"{eps:.4g} where they have a budget, `cw-l2` unbounded. Seed {record['seed']}. "
        f"{record['device']['name']}, torch {record['versions']['torch']}, {record['seconds'] / 60:.0f} minutes beside "
        f"other work. Code of {' and '.join(sorted({row['commit'] for row in rows}))}, {record['date'][:10]}.",
    ]
    return "\n\n".join(told)


def draw() -> None:
    """The figures beside the page."""
    for name, record in records().items():
        write_atomic(FOLDER / f"{name}.svg", drawn(record))


PAGE = Page("robust.experiments.detection.page", README, "record", section, draw)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
