"""Measures the transfer matrix between ResNet-20, a ConvNet, and substitutes of ResNet-20 on CIFAR-10.

    python -m robust.experiments.transfer.measure OUT.json RESNET20.safetensors --data-root DIR [--n 1000]

DIR holds CIFAR-10. A part that OUT.json already holds is kept, so that an interrupted measurement goes on; substitutes
are kept beside it, in OUT-NAME.safetensors. `OUT.svg` is the picture.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from robust.attacks.transfer.figure import heat_map
from robust.attacks.transfer.matrix import OTHERS, Cell, TransferTable, transfer_matrix
from robust.attacks.transfer.pairs import queried_pairs
from robust.attacks.transfer.substitutes import Lesson, distil, untrained
from robust.checkpoint import write_tensors
from robust.classifier import Classifier
from robust.data import Data, load_data
from robust.digest import read_json, write_atomic, write_json
from robust.evaluate import evaluate
from robust.experiments.benchmarks.harness import conditions
from robust.models import load_classifier
from robust.oracle import Oracle
from robust.threat import Linf

EPS = 8 / 255
STEPS = 10
SEED = 0
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LESSON = Lesson(epochs=40, temperature=4.0, seed=SEED)
TARGET = "resnet20"
# What a substitute of ResNet-20 is taught on: images without their labels, or none at all.
POOLS = {"queried": "train", "data-free": None}
# Attacks by name; the first of every group is what the others are compared with. Step sizes are the papers': eps / 10
# for all but PGD, which has its usual 2.5 eps / 10.
CHEAP: dict[str, dict[str, Any]] = {
    "pgd": {},
    "mifgsm": {},
    "difgsm": {},
    "m-difgsm": {"attack": "difgsm", "decay": 1.0},
    "nifgsm": {},
    "tifgsm": {},
}
DEAR: dict[str, dict[str, Any]] = {"pgd": {}, "sinifgsm": {}}
# The same at equal step sizes: PGD with the others' (`-short`), the others with PGD's (`-wide`).
SHORT, LONG = {"step_size": EPS / STEPS}, {"step_size": 2.5 * EPS / STEPS}
EVEN: dict[str, dict[str, Any]] = {
    "pgd": {},
    "pgd-short": {"attack": "pgd", **SHORT},
    "mifgsm-wide": {"attack": "mifgsm", **LONG},
    "difgsm-wide": {"attack": "difgsm", **LONG},
    "m-difgsm-wide": {"attack": "difgsm", "decay": 1.0, **LONG},
}
DEAREST: dict[str, dict[str, Any]] = {"pgd": {}, "vmifgsm": {}}
EVEN_DEAR: dict[str, dict[str, Any]] = {"pgd": {}, "vmifgsm-wide": {"attack": "vmifgsm", **LONG}}
FUSED: dict[str, dict[str, Any]] = {"pgd": {}, "mifgsm": {}}
ORDER = ("pgd", "pgd-short", *list(CHEAP)[1:], "vmifgsm", "sinifgsm", *list(EVEN)[2:], "vmifgsm-wide")


def substitute(
    target: Classifier, pool: Data | None, queries: int, place: Path
) -> tuple[Classifier, dict[str, Any]]:
    """A substitute of the target from `queries` of its scores; taken from `place` where that holds it already."""
    oracle, begun = Oracle(target), time.perf_counter()
    pairs = queried_pairs(oracle, pool, queries, seed=SEED, shape=(3, 32, 32))
    if place.exists():
        clf = _recall(place)
    else:
        clf = distil(pairs, bounds=target.bounds, lesson=LESSON)
        about = {"#mean": clf.mean.flatten(), "#std": clf.std.flatten()}
        write_tensors(place, {**clf.module.state_dict(), **about})
    agreement = float((clf.logits(pairs.x[:1000]).argmax(1) == pairs.labels[:1000]).double().mean())
    seconds = round(time.perf_counter() - begun, 1)
    return clf, {
        "queries": oracle.cost.queries,
        "lesson": asdict(LESSON),
        "agreement": agreement,
        "seconds": seconds,
    }


def _recall(place: Path) -> Classifier:
    from safetensors.torch import load_file

    state = load_file(place)
    statistics = state.pop("#mean").tolist(), state.pop("#std").tolist()
    clf = untrained((3, 32, 32), 10, LESSON, statistics=statistics)
    clf.module.load_state_dict(state)
    return clf


def share(n: int = 100) -> dict[str, Any]:
    """What the stages of the suite `full` take on the adversarially trained digits model, in seconds."""
    x, y = load_data("digits", n=n).tensors()
    verdict = evaluate(load_classifier("zoo:digits-at", device="cpu"), x, y, threat=Linf(0.2), suite="full")
    seconds: dict[str, float] = {}
    for stage in verdict.manifest["stages"]:
        seconds[stage["attack"]] = round(stage["cost"]["seconds"], 2)
    about = {"model": "zoo:digits-at", "eps": 0.2, "n": n, "robust_accuracy": verdict.robust_accuracy}
    return {**about, "seconds": seconds}


def merge(parts: Mapping[str, Mapping[str, Any]]) -> TransferTable:
    """One table of all parts' cells, in the order of `ORDER`; what two parts measured both was the same."""
    tables = [TransferTable.from_dict(part) for part in parts.values()]
    first = tables[0]
    cells: dict[tuple[str, str, str], Cell] = {}
    attacks: dict[str, Mapping[str, Any]] = {}
    for table in tables:
        attacks |= table.attacks
        cells |= {(cell.attack, cell.source, cell.target): cell for cell in table.cells}
    sources = tuple(dict.fromkeys(name for table in tables for name in table.sources))
    names = {name: attacks[name] for name in ORDER if name in attacks}
    return TransferTable(
        first.models, sources, names, first.threat, first.n, first.seed,
        tuple(cell for name in names for key, cell in cells.items() if key[0] == name),
    )  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=5000)
    arguments = parser.parse_args()
    out: Path = arguments.out
    record: dict[str, Any] = read_json(out) if out.exists() else {"substitutes": {}, "parts": {}}
    target = load_classifier("zoo:resnet20", weights=arguments.weights, mean=MEAN, std=STD, device="cpu")
    taught: dict[str, Classifier] = {}
    for name, part in POOLS.items():
        pool = None if part is None else load_data("cifar10", root=arguments.data_root, train=True)
        place = out.with_name(f"{out.stem}-{name}.safetensors")
        taught[name], told = substitute(target, pool, arguments.queries, place)
        record["substitutes"].setdefault(name, {"pool": part or "synthetic", **told})
        write_json(out, record)
        print(name, told, flush=True)
    models = {TARGET: target, "convnet": load_classifier("zoo:cifar10-convnet", device="cpu"), **taught}
    x, y = load_data("cifar10", n=arguments.n, root=arguments.data_root).tensors()
    if "full" not in record:
        record["full"] = share()
        write_json(out, record)
    work: dict[str, tuple[Any, dict[str, Any]]] = {
        f"{source}/cheap": (CHEAP, {"sources": [source]})
        for source in (TARGET, "convnet", "queried", "data-free")
    }
    for name, attacks in (("even", EVEN), ("even-dear", EVEN_DEAR), ("dear", DEAR)):
        work[f"{TARGET}/{name}"] = (attacks, {"sources": [TARGET]})
    work[OTHERS] = (FUSED, {"sources": [], "fused": "logits"})
    work[f"{TARGET}/dearest"] = (DEAREST, {"sources": [TARGET]})
    for key, (attacks, options) in work.items():
        if key in record["parts"]:
            continue
        begun = time.perf_counter()
        table = transfer_matrix(models, x, y, Linf(EPS), attacks, steps=STEPS, seed=SEED, **options)
        took = round(time.perf_counter() - begun, 1)
        record["parts"][key] = {**table.to_dict(), "seconds": took, **conditions(target.device)}
        write_json(out, record)
        print(key, {c.attack: (c.target, round(c.rate, 3)) for c in table.cells}, f"{took} s", flush=True)
    write_atomic(out.with_suffix(".svg"), heat_map(merge(record["parts"])))


if __name__ == "__main__":
    main()
