"""Measures every detector on MNIST's LeNet5 or CIFAR-10's ResNet-20: PGD, C&W, the attack that knows it, and queries.

    python -m robust.experiments.detection.measure SUBJECT RUN OUT.json WEIGHTS [--n 1000] [--data-root DIR]
        [--data DATA --learn-data DATA] [--detector NAME ...] [--device cuda]

SUBJECT is mnist or cifar10. RUN is the folder of the run: an interrupted measurement goes on with what it holds, and
OUT.json, the record, is written after every detector. Images: the first N of the test part are attacked, the next
1,000 set the thresholds, 3,000 of the training part are learnt from.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robust.cli.detect import make_detectors
from robust.data import load_data
from robust.detection import AWARE, Question, Samples, run_detection
from robust.digest import read_json, write_json
from robust.models import load_classifier
from robust.threat import Linf

HELD_OUT, LEARN, ACCOUNTS, QUERIES, SEED = 1000, 3000, 25, 500, 0
# Where the record has the curves, by the part of clean inputs that is flagged.
GRID = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
KEPT = ("model", "threat", "seed", "accounts", "queries", "clean_accuracy", "attacks", "warnings")


@dataclass(frozen=True)
class Subject:
    """A model with its data, the radius, and detectors as the papers set them for such data."""

    model: str
    data: str
    eps: float
    detectors: tuple[str, ...]
    attacks: Mapping[str, Mapping[str, Any]]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


SUBJECTS = {
    "mnist": Subject(
        "zoo:lenet5", "mnist", 0.3,
        (
            "feature-squeezing:bits=1,median=2,search=0",
            "magnet-error:noise=0.1",
            "magnet-divergence:noise=0.1",
            "mahalanobis",
            "lid",
            "similarity",
            "region:radius=0.3,votes=50,gradient_votes=5",
        ),
        {
            "pgd": {"steps": 40},
            "cw-l2": {"steps": 100, "search_steps": 4, "initial_c": 1.0, "step_size": 0.1},
            AWARE: {"steps": 40, "restarts": 1},
        },
    ),
    "cifar10": Subject(
        "zoo:resnet20", "cifar10", 8 / 255,
        (
            "feature-squeezing:bits=5,median=2,search=13",
            "magnet-error:noise=0.025",
            "magnet-divergence:noise=0.025",
            "mahalanobis",
            "lid",
            "similarity",
            "region:radius=0.02,votes=50,gradient_votes=5",
        ),
        {
            "pgd": {"steps": 20},
            "cw-l2": {"steps": 40, "search_steps": 4, "initial_c": 1.0},
            AWARE: {"steps": 30, "restarts": 1},
        },
        (0.485, 0.456, 0.406), (0.229, 0.224, 0.225),
    ),
}  # fmt: skip


def question(given: argparse.Namespace) -> Question:
    """What is asked, with its samples in memory."""
    subject = SUBJECTS[given.subject]
    data = given.data or subject.data
    clf = load_classifier(
        subject.model, weights=given.weights, mean=subject.mean, std=subject.std, device=given.device
    )
    test = load_data(data, n=given.n + HELD_OUT, root=given.data_root)
    learn = load_data(given.learn_data or data, n=LEARN, root=given.data_root, train=True)
    x, y = test.tensors()
    chosen = make_detectors(subject.detectors, subject.eps)
    if given.detector:
        chosen = {name: item for name, item in chosen.items() if item.name in given.detector}
    return Question(
        clf, Samples(x[: given.n], y[: given.n]), Samples(x[given.n :], y[given.n :]), Samples(*learn.tensors()),
        {item.name: item for item in chosen.values()}, subject.attacks, Linf(subject.eps), None, SEED, ACCOUNTS,
        QUERIES,
    )  # fmt: skip


def record(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is kept of a run: the table, and the curves on `GRID`."""
    about = {key: found[key] for key in (*KEPT, "seconds", "date", "device", "versions")}
    samples = {part: told["n"] for part, told in found["data"].items()}
    return {
        "subject": name,
        "samples": samples,
        **about,
        "grid": list(GRID),
        "detectors": [{**_thin(row), "commit": found["commit"]} for row in found["detectors"]],
    }


def _thin(row: Mapping[str, Any]) -> dict[str, Any]:
    attacks = {name: {**told, "curve": _on_grid(told.get("curve"))} for name, told in row["attacks"].items()}
    return {**row, "attacks": attacks}


def _on_grid(curve: list[list[float]] | None) -> list[float]:
    """The curve's heights at `GRID`; nothing where there is no curve."""
    return [round(max(b for a, b in curve if a <= at), 4) for at in GRID] if curve else []


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--data")
    parser.add_argument("--learn-data")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--detector", action="append")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    asked, before = question(given), dict[str, Any]()
    for name, detector in asked.detectors.items():
        one = replace(asked, detectors={name: detector})
        found = run_detection(
            one, out=given.run, resume=given.run.exists(),
            progress=lambda done, text: print(f"{done:4.0%} {text}", flush=True),
        )  # fmt: skip
        told = record(found, given.subject)
        if given.out.exists():
            before = {row["name"]: row for row in read_json(given.out)["detectors"]}
        rows = {**before, **{row["name"]: row for row in told["detectors"]}}
        told["detectors"] = [rows[key] for key in sorted(rows)]
        write_json(given.out, told)
        print(name, found["detectors"][0]["verdict"], round(found["seconds"]), "seconds so far", flush=True)


if __name__ == "__main__":
    main()
