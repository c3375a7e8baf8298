"""What hides a gradient, on a real model: verdicts of PGD, of labels alone, and of the suite `full`, on the record.

python -m robust.experiments.catalogue.masked OUT.json MODEL DATA --weights FILE --mean … --std … [--n N] [--eps EPS]
"""

from __future__ import annotations

import argparse
import datetime as dt
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.config import number
from robust.data import load_data
from robust.digest import write_json
from robust.evaluate import evaluate
from robust.experiments.benchmarks.harness import conditions
from robust.experiments.verdicts.reference import add_subject, subject_model
from robust.threat import Linf

SUITES = ("pgd", "decision", "standard", "full")


class Rounds(nn.Module):
    """A model whose inputs are rounded to a few levels first: its gradient is zero everywhere.

    Args:
        inner: a module whose inputs lie in [0, 1].
        levels: of the rounded inputs, 0 and 1 included.
    """

    def __init__(self, inner: nn.Module, levels: int = 5) -> None:
        super().__init__()
        self.inner, self.steps = inner, levels - 1

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of x (N, C, H, W) in [0, 1]."""
        logits: Tensor = self.inner((x * self.steps).round() / self.steps)
        return logits


class Saturates(nn.Module):
    """A model whose softmax is a step: the cross-entropy's gradient vanishes in float32.

    Args:
        inner: a module that returns logits.
        factor: what they are multiplied by.
    """

    def __init__(self, inner: nn.Module, factor: float = 1e4) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes)."""
        logits: Tensor = self.factor * self.inner(x)
        return logits


class _Plain(nn.Module):
    """A classifier with its normalisation as a module of [0, 1] inputs."""

    mean: Tensor
    std: Tensor

    def __init__(self, clf: Classifier) -> None:
        super().__init__()
        self.module = clf.module
        self.register_buffer("mean", clf.mean)
        self.register_buffer("std", clf.std)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.module((x - self.mean) / self.std)
        return logits


def masks(clf: Classifier) -> dict[str, Classifier]:
    """The model plain, and behind each mask."""
    plain = _Plain(clf)
    return {
        "plain": clf,
        "rounds to 16 levels": Classifier(Rounds(plain, 16).eval(), name=f"{clf.name}, rounded inputs"),
        "saturates": Classifier(Saturates(plain).eval(), name=f"{clf.name}, saturated logits"),
    }


def measure(clf: Classifier, x: Tensor, y: Tensor, eps: float) -> dict[str, Any]:
    """Every suite's robust accuracy and doubts on one model."""
    found: dict[str, Any] = {}
    for suite in SUITES:
        begun = time.perf_counter()
        verdict = evaluate(clf, x, y, threat=Linf(eps), suite=suite)
        found[suite] = {
            "clean_accuracy": verdict.clean_accuracy,
            "robust_accuracy": verdict.robust_accuracy,
            "broken_by": dict(Counter(name for name in verdict.broken_by if name)),
            "warnings": list(verdict.warnings),
            "seconds": round(time.perf_counter() - begun, 1),
        }
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    add_subject(parser)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--eps", type=number, default=8 / 255)
    arguments = parser.parse_args()
    clf = subject_model(arguments)
    x, y = load_data(arguments.data, n=arguments.n, root=arguments.data_root).tensors()
    record: dict[str, Any] = {
        "subject": {"model": clf.name, "digest": clf.digest(), "n": arguments.n},
        "eps": arguments.eps,
        "masks": {},
        **conditions(torch.device("cpu")),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }
    for name, masked in masks(clf).items():
        record["masks"][name] = measure(masked, x, y, arguments.eps)
        accuracies = {suite: one["robust_accuracy"] for suite, one in record["masks"][name].items()}
        print(f"{name}: {accuracies}", flush=True)
    write_json(arguments.out, record)


if __name__ == "__main__":
    main()
