"""Certifies a Gaussian-trained ResNet-20 on CIFAR-10 test images at sigma 0.25, by fixed and by sequential votes.

    python -m robust.experiments.certified.measure OUT WEIGHTS --data DATA [--samples 200] [--n 10000]

OUT is a folder: OUT/fixed and OUT/sequential are runs of `robust certify` that an interrupted measurement goes on with,
OUT/smoothing.json is the record, with the counts of every sample. DATA is as the command line takes it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust.certificate import Record
from robust.certify import RECORD, load_certificate, run_certificate
from robust.classifier import Classifier
from robust.data import Data, load_data
from robust.defenses.certified import RandomizedSmoothing
from robust.digest import write_json
from robust.experiments.benchmarks.harness import conditions
from robust.models import load_classifier

SIGMA, RADII, FIRST, ALPHA, SEED = 0.25, (0.25, 0.5), 100, 0.001, 0
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # as in train/cifar10-gaussian.toml
KEPT = ("index", "label", "class", "radius", "chosen", "lower", "n", "votes", "selection")


def measure(clf: Classifier, data: Data, out: Path, n: int) -> dict[str, Any]:
    """The record: both procedures on the same samples, with the same noise."""
    found: dict[str, Any] = {}
    for name, sequential in (("fixed", False), ("sequential", True)):
        folder = out / name
        certificate = RandomizedSmoothing(clf, sigma=SIGMA, seed=SEED)
        settings = {"radii": list(RADII), "n0": FIRST, "n": n, "alpha": ALPHA, "sequential": sequential}
        if not (folder / RECORD).exists():
            run_certificate(
                certificate, data, settings, RADII, out=folder, resume=folder.exists(),
                progress=lambda done, text: print(f"{done:4.0%} {text}", flush=True),
            )  # fmt: skip
        told, records = load_certificate(folder)
        kept = [{key: record[key] for key in KEPT} for record in records]
        found[name] = {
            **{key: told[key] for key in ("certified_accuracy", "voters", "seconds")},
            "samples": kept,
        }
    about = {"sigma": SIGMA, "radii": list(RADII), "n0": FIRST, "n": n, "alpha": ALPHA, "seed": SEED}
    model = {"name": clf.name, "digest": clf.digest()}
    return {"settings": about, "model": model, "data": data.name, **conditions(clf.device), **found}


def compare(fixed: Sequence[Record], sequential: Sequence[Record]) -> dict[str, Any]:
    """Votes spent, and the samples that only the fixed procedure decides, at each radius."""
    lost = {
        str(radius): sum(a["radius"] >= radius > b["radius"] for a, b in zip(fixed, sequential, strict=True))
        for radius in RADII
    }
    votes = [sum(FIRST + record["n"] for record in records) for records in (fixed, sequential)]
    return {"lost": lost, "votes": votes, "share": votes[1] / votes[0]}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    clf = load_classifier("zoo:resnet20", weights=given.weights, mean=MEAN, std=STD, device=given.device)
    data = load_data(given.data, n=given.samples, root=given.data_root)
    record = measure(clf, data, given.out, given.n)
    write_json(given.out / "smoothing.json", record)
    print(compare(record["fixed"]["samples"], record["sequential"]["samples"]))


if __name__ == "__main__":
    main()
