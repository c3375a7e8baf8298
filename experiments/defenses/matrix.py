"""Makes the page's matrix: the undefended ResNet-20, every transform on it, and trained models, on CIFAR-10.

    python -m robust.experiments.defenses.matrix RUN RESNET20.safetensors [NAME=MODEL@WEIGHTS@mean=...@std=... ...]
        [--data cifar10] [--data-root DIR] [--n 200] [--patch-steps N] [--verify]

It is `robust matrix` with the parameters of `measure.CASES`; RUN keeps the evidence of every cell, and the same words
go on after a kill. What a reader needs of the record goes beside this file, paths of the machine stay behind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust.digest import read_json, write_json
from robust.experiments.defenses.measure import CASES, MEAN, STD
from robust.report_matrix import RECORD as WRITTEN

RECORD = Path(__file__).parent / "matrix.json"
SURROGATE = "zoo:cifar10-convnet"
COLUMNS = ("quick", "standard", "patch", "transfer")


def command(
    run: Path, weights: Path, models: Sequence[str], *, data: str = "cifar10", n: int = 200
) -> list[str]:
    """The words of `robust matrix`, without those that only say where data lies or how long patches are learnt."""
    mean, std = (",".join(map(str, values)) for values in (MEAN, STD))
    words = ["matrix", f"resnet20=zoo:resnet20@{weights}@mean={mean}@std={std}", *models]
    for specs in CASES.values():
        words += ["--defense", "+".join(specs)]
    for column in COLUMNS:
        words += ["--suite", column]
    words += ["--surrogate", SURROGATE, "--data", data, "--norm", "linf", "--eps", "8/255", "--n", str(n)]
    return [*words, "--out", str(run)]


def keep(run: Path, path: Path, name: str = "cifar10") -> dict[str, Any]:
    """Writes the record of a finished RUN to `path`, without its command, under the data's own name."""
    record = read_json(run / WRITTEN)
    kept = {key: value for key, value in record.items() if key != "command"}
    kept["data"] = {**record["data"], "name": name}
    write_json(path, kept)
    return kept


def main() -> int:
    """The command line."""
    from robust.cli.main import run as robust

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("weights", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--patch-steps", type=int)
    parser.add_argument("--verify", action="store_true")
    given = parser.parse_args()
    words = command(given.run, given.weights, given.models, data=given.data, n=given.n)
    for option, value in (("--data-root", given.data_root), ("--patch-steps", given.patch_steps)):
        words += [] if value is None else [option, str(value)]
    code = robust([*words, "--verify" if given.verify else "--resume"])
    if code == 0 and not given.verify:
        keep(given.run, RECORD)
    return code


if __name__ == "__main__":
    sys.exit(main())
