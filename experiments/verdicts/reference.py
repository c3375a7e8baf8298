"""AutoAttack as published, from torchattacks' components: the independent oracle that verdicts are compared with.

torchattacks' own ``AutoAttack`` runs APGD and FAB with 10 steps, so its parts are composed here with the published
numbers. Every part runs alone on all correct samples; the ensemble is the union of what they break. A claim counts
only if it is inside the ball and misclassified by the plain float32 model. Needs the extra ``bench``::

    python -m robust.experiments.verdicts.reference zoo:lenet5 mnist 0.3 OUT.json --n 300 --weights FILE --data-root DIR

It may be stopped and started again: finished batches are kept.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.data import load_data
from robust.digest import write_json
from robust.models import load_classifier
from robust.threat import Linf

PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")
BATCH = 50


class _Logits(nn.Module):
    """The classifier as the plain module that torchattacks wants."""

    def __init__(self, clf: Classifier) -> None:
        super().__init__()
        self.inner = clf.module
        self.clf = [clf]  # in a list, so that it is no submodule

    def forward(self, x: Tensor) -> Tensor:
        """Logits of points in [0, 1]."""
        return self.clf[0](x)


def build(part: str, model: nn.Module, eps: float, seed: int, classes: int) -> Any:
    """One component of torchattacks with the numbers of AutoAttack's standard version."""
    import torchattacks

    common: dict[str, Any] = {"norm": "Linf", "eps": eps, "seed": seed, "n_restarts": 1}
    if part == "apgd-ce":
        return torchattacks.APGD(model, steps=100, loss="ce", eot_iter=1, rho=0.75, **common)
    if part == "apgd-t":
        return torchattacks.APGDT(model, steps=100, eot_iter=1, rho=0.75, n_classes=classes, **common)
    if part == "fab-t":
        return torchattacks.FAB(
            model,
            steps=100,
            alpha_max=0.1,
            eta=1.05,
            beta=0.9,
            multi_targeted=True,
            n_classes=classes,
            **common,
        )
    # AutoAttack does not stretch Square's schedule over its 5,000 queries; torchattacks' default does.
    return torchattacks.Square(
        model, n_queries=5000, p_init=0.8, loss="margin", resc_schedule=False, **common
    )


def run_batch(
    part: str, clf: Classifier, x: Tensor, y: Tensor, eps: float, seed: int
) -> tuple[Tensor, float]:
    """(B,) which samples fall, checked on the plain model, and the process seconds it took."""
    attack = build(part, _Logits(clf), eps, seed, clf.classes)
    begun = time.process_time()
    with torch.no_grad():
        x_adv = attack(x, y).detach()
    seconds = time.process_time() - begun
    inside = Linf(eps + 1e-6).inside(x_adv, x, clf.bounds)
    return inside & (clf.logits(x_adv).argmax(1) != y), seconds


def run(arguments: argparse.Namespace) -> None:
    """All parts on all correct samples, written after every batch."""
    clf = subject_model(arguments)
    x, y = load_data(arguments.data, n=arguments.n, root=arguments.data_root).tensors()
    correct = (clf.logits(x).argmax(1) == y).nonzero()[:, 0].tolist()
    conditions = {"model": clf.digest(), "eps": arguments.eps, "n": len(y), "seed": arguments.seed}
    record: dict[str, Any] = {**conditions, "torch": torch.__version__, "correct": correct, "parts": {}}
    if arguments.out.exists():
        stored = json.loads(arguments.out.read_text())
        if {key: stored[key] for key in conditions} != conditions:
            raise SystemExit(f"error: {arguments.out} is about other conditions; choose another file")
        record = stored
    for name in arguments.parts:
        part = record["parts"].setdefault(name, {"attacked": [], "broken": [], "seconds": 0.0})
        todo = [i for i in correct if i not in set(part["attacked"])]
        for start in range(0, len(todo), BATCH):
            rows = todo[start : start + BATCH]
            fell, seconds = run_batch(name, clf, x[rows], y[rows], arguments.eps, arguments.seed)
            part["attacked"] += rows
            part["broken"] += [i for i, hit in zip(rows, fell.tolist(), strict=True) if hit]
            part["seconds"] += seconds
            write_json(arguments.out, record)
            print(
                f"{name}: {len(part['broken'])} of {len(part['attacked'])} fell, {part['seconds']:.0f} s",
                flush=True,
            )


def compare(record: dict[str, Any], robust: list[bool]) -> dict[str, list[int]]:
    """Samples on which the reference and a verdict disagree.

    Args:
        record: what `run` wrote; robust: per sample whether the verdict says that it is correct and unbroken.

    Returns:
        "missed": broken by the reference, robust by the verdict; "beyond": the other way round, among correct ones.
    """
    broken = {i for part in record["parts"].values() for i in part["broken"]}
    return {
        "missed": sorted(i for i in broken if robust[i]),
        "beyond": sorted(i for i in record["correct"] if i not in broken and not robust[i]),
    }


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def add_subject(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a model and its data."""
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--mean", type=_numbers)
    parser.add_argument("--std", type=_numbers)


def subject_model(arguments: argparse.Namespace) -> Classifier:
    """The model that the arguments of `add_subject` name, on the CPU."""
    return load_classifier(
        arguments.model, weights=arguments.weights, mean=arguments.mean, std=arguments.std, device="cpu"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_subject(parser)
    parser.add_argument("eps", type=float)
    parser.add_argument("out", type=Path)
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    run(parser.parse_args())


if __name__ == "__main__":
    main()
