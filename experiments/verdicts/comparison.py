"""Compares a verdict with AutoAttack as published, the whole and every component alone, and records both.

    python -m robust.experiments.verdicts.comparison RUN REFERENCE.json OUT.json MODEL DATA --weights FILE …

`RUN` is a finished `robust eval --suite standard` on the samples that `reference.py` wrote `REFERENCE.json` about. Our
components run alone on every sample that anything breaks; the others have withstood each of them in the run already.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.attacks import get
from robust.classifier import Classifier
from robust.conditions import commit_of, device_name
from robust.data import load_data
from robust.digest import write_json
from robust.experiments.verdicts.reference import PARTS, add_subject, compare, subject_model
from robust.threat import Linf
from robust.verdict import Verdict


def alone(
    clf: Classifier, x: Tensor, y: Tensor, rows: list[int], eps: float, precision: Any
) -> dict[str, dict[str, Any]]:
    """What each component of the suite breaks of the samples `rows` of x (N, C, H, W), with its process seconds."""
    found: dict[str, dict[str, Any]] = {}
    index = torch.tensor(rows, dtype=torch.long)
    for name in PARTS:
        begun = time.process_time()
        attack = get(name)(threat=Linf(eps), until="broken")
        success = attack.run(clf, x[index], y[index], index=index, precision=precision).success
        found[name] = {
            "broken": index[success].tolist(),
            "seconds": round(time.process_time() - begun, 1),
        }
        print(f"{name}: {len(found[name]['broken'])} of {len(rows)}", flush=True)
    return found


def make_comparison(run: Path, reference: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The record: both verdicts, both sides' components, and where they disagree."""
    verdict = Verdict.load(run)
    manifest = verdict.manifest
    fell = (verdict.correct & ~verdict.robust).nonzero()[:, 0].tolist()
    parts = {
        name: {"broken": part["broken"], "seconds": round(part["seconds"], 1)}
        for name, part in reference["parts"].items()
    }
    return {
        "commit": commit_of(Path(__file__).parent),
        "date": datetime.now(UTC).date().isoformat(),
        "model": manifest["model"]["name"],
        "model_digest": manifest["model"]["digest"],
        "data": {key: manifest["data"][key] for key in ("name", "n", "digest")},
        "eps": reference["eps"],
        "versions": manifest["versions"],
        "device": {**manifest["device"], "processor": device_name(torch.device("cpu"))},
        "precision": manifest["precision"],
        "twins": manifest["twins"],
        "correct": int(verdict.correct.sum()),
        "reference": {"seed": reference["seed"], "correct": len(reference["correct"]), "parts": parts},
        "ours": {"seed": manifest["seed"], "broken": fell, "stages": manifest["stages"], "alone": found},
        **compare(reference, verdict.robust.tolist()),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("out", type=Path)
    add_subject(parser)
    arguments = parser.parse_args()
    reference = json.loads(arguments.reference.read_text())
    clf = subject_model(arguments)
    x, y = load_data(arguments.data, n=reference["n"], root=arguments.data_root).tensors()
    verdict = Verdict.load(arguments.run)
    verdict.verify(clf, x, y)
    rows = {i for part in reference["parts"].values() for i in part["broken"]}
    rows |= set((verdict.correct & ~verdict.robust).nonzero()[:, 0].tolist())
    found = alone(clf, x, y, sorted(rows), reference["eps"], verdict.manifest["precision"])
    record = make_comparison(arguments.run, reference, found)
    write_json(arguments.out, record)
    print(f"missed {record['missed']}, beyond {record['beyond']}")


if __name__ == "__main__":
    main()
