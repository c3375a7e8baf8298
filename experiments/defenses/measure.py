"""Measures every input transform on the undefended ResNet-20 (CIFAR-10, linf 8/255), adaptively and not.

    python -m robust.experiments.defenses.measure OUT.json RESNET20.safetensors --data-root DIR [--n 200] [--few 100]

DIR holds CIFAR-10; randomised transforms, which take 20 gradients for one, get the first `--few` images. A case that
OUT.json already holds is kept, so that an interrupted measurement goes on.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from robust.classifier import Classifier
from robust.cli.settings import make_defenses
from robust.data import Data, load_data
from robust.defense import compose
from robust.digest import read_json, write_json
from robust.evaluate import evaluate
from robust.experiments.benchmarks.harness import conditions
from robust.models import load_classifier
from robust.threat import Linf

EPS = 8 / 255
SUITES = {False: "quick", True: "rand"}  # by whether it is randomised
SEED = 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# As the command line writes them, and as strong as leaves at least 70 % clean accuracy, or near it.
CASES: dict[str, list[str]] = {
    "mean-smooth": ["mean-smooth:size=2"],
    "gaussian-smooth": ["gaussian-smooth:sigma=0.6"],
    "median-smooth": ["median-smooth:size=2"],
    "bit-depth": ["bit-depth:bits=3"],
    "jpeg": ["jpeg:quality=75"],
    "jpeg, bit-depth": ["jpeg:quality=90", "bit-depth:bits=4"],
    "resize-pad": ["resize-pad:smallest=0.85"],
    "gaussian-noise": ["gaussian-noise:sigma=0.03"],
    "random-crop": ["random-crop:share=0.8"],
    "tv-min": ["tv-min:drop=0.3"],
}


def measure(clf: Classifier, data: Data, specs: list[str]) -> dict[str, Any]:
    """One verdict's numbers on the data, and the accuracy that the adaptive attacks alone leave."""
    defended = compose(clf, make_defenses(specs))
    verdict = evaluate(defended, data, threat=Linf(EPS), suite=SUITES[defended.randomised], seed=SEED)
    fell = Counter(name for name in verdict.broken_by if name is not None)
    unaware = sum(count for name, count in fell.items() if name.startswith("non-adaptive"))
    summary = {key: value for key, value in verdict.summary().items() if key not in ("out", "curve")}
    return {
        "specs": specs,
        **summary,
        "adaptive_accuracy": (int(verdict.robust.sum()) + unaware) / len(verdict),
        "broken_by": dict(fell),
        "stages": verdict.manifest["suite"]["stages"],
        "draws": verdict.manifest["draws"],
        "seed": SEED,
        "model": clf.digest(),
        **conditions(clf.device),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--few", type=int, default=100)
    arguments = parser.parse_args()
    out: Path = arguments.out
    record: dict[str, Any] = read_json(out) if out.exists() else {"cases": {}}
    clf = load_classifier("zoo:resnet20", weights=arguments.weights, mean=MEAN, std=STD, device="cpu")
    data = {
        randomised: load_data("cifar10", n=n, root=arguments.data_root)
        for randomised, n in ((False, arguments.n), (True, arguments.few))
    }
    for name, specs in CASES.items():
        if name in record["cases"]:
            continue
        randomised = any(item.randomised for item in make_defenses(specs))
        found = record["cases"][name] = measure(clf, data[randomised], specs)
        write_json(out, record)
        told = {key: round(found[key], 3) for key in ("clean_accuracy", "adaptive_accuracy", "seconds")}
        print(name, told, found["non_adaptive"], flush=True)


if __name__ == "__main__":
    main()
