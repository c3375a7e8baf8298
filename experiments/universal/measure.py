"""Learns patches and universal perturbations on 500 images and measures them on unseen ones, whatever comes out.

    python -m robust.experiments.universal.measure OUT_DIR MODEL DATA --weights FILE --mean … --std … \\
        [--also MODEL[@WEIGHTS] …] [--only NAME …] [--n 1500] [--train 500]

One record per case goes to OUT_DIR/NAME.json, a patch also as NAME.png. A record that exists is kept, unless it is
named; `--transfer` only asks the models of `--also` about the changes that are stored beside their records.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from robust.attacks import get
from robust.classifier import Classifier
from robust.data import Data, load_data
from robust.digest import read_json, write_json
from robust.experiments.benchmarks.harness import conditions
from robust.experiments.verdicts.reference import add_subject, subject_model
from robust.models import load_classifier
from robust.threat import Linf
from robust.universal_run import UniversalRun, elsewhere, learn_and_measure

LEFT_OUT = ("date", "versions", "device", "command", "out", "history")


@dataclass(frozen=True)
class Case:
    """One change to learn: the attack, its fields, its class by name, and what it must reach, if anything."""

    attack: str
    target: str | None = None
    fields: dict[str, Any] = field(default_factory=dict)
    floor: float | None = None

    def build(self, data: Data) -> Any:
        """The attack: a patch of a tenth of the area, or a perturbation of 8/255."""
        if self.attack == "patch":
            return get("patch").sized(0.1, data.shape[1], data.shape[2], **self.fields)
        return get(self.attack)(threat=Linf(8 / 255), **self.fields)


FEWER = {"steps": 500}  # towards a class a fifth of the steps is enough
OFTEN = {"restarts": 4}
PLAIN = {"brightness": 0.0, "noise": 0.0}  # learnt for rotation, scale and place alone
CASES = {
    "patch": Case("patch", fields=OFTEN, floor=0.8),
    "patch-round": Case("patch", fields={"shape": "round", **OFTEN, **PLAIN}, floor=0.8),
    "patch-to-automobile": Case("patch", "automobile", FEWER, floor=0.5),
    "patch-to-bird": Case("patch", "bird", FEWER, floor=0.5),
    "patch-to-ship": Case("patch", "ship", FEWER, floor=0.5),
    "uap": Case("uap", floor=0.6),
    "targeted-uap-to-bird": Case("targeted-uap", "bird"),
}


def measure(
    case: Case, clf: Classifier, data: Data, others: dict[str, Classifier], train: int
) -> UniversalRun:
    """One case, learnt on the first `train` images and measured on the rest."""
    learn, unseen = data.subset(range(train)), data.subset(range(train, len(data)))
    target = None if case.target is None else data.classes.index(case.target)
    return learn_and_measure(
        case.build(data), clf, learn, unseen, name=case.attack, target=target, others=others,
        progress=lambda done, text: None,
    )  # fmt: skip


def record_of(run: UniversalRun, case: Case, clf: Classifier) -> dict[str, Any]:
    """The run's numbers with this checkout's conditions, and whether they reach the floor."""
    kept = {key: value for key, value in run.summary.items() if key not in LEFT_OUT}
    kept["data"] = "CIFAR-10 test, round robin over the classes"
    rate = run.summary["success_rate"]
    holds = None if case.floor is None else rate is not None and rate > case.floor
    return {
        "floor": case.floor,
        "holds": holds,
        **kept,
        "history": run.summary["history"][-1:],
        **conditions(clf.device),
    }


def transfer(path: Path, case: Case, data: Data, others: dict[str, Classifier], train: int) -> dict[str, Any]:
    """A record with what other models say about the change that is stored beside it."""
    from robust.attacks.patch.trained import TrainedPatch
    from robust.attacks.universal.perturbation import Perturbation

    record = read_json(path)
    kind: Any = TrainedPatch if case.attack == "patch" else Perturbation
    change, unseen = kind.load(path.with_suffix(".safetensors")), data.subset(range(train, len(data)))
    held = {row["model"]: row for row in record["transfer"]}
    for name, clf in others.items():
        held[name] = {"model": name, **elsewhere(clf, unseen, change, record["target"], record["seed"])}
    return {**record, "transfer": list(held.values())}


def others_of(arguments: argparse.Namespace, data: Data) -> dict[str, Classifier]:
    """The models of `--also`, called by their specification."""
    found = {}
    for text in arguments.also:
        spec, _, weights = text.partition("@")
        statistics = {"mean": arguments.mean, "std": arguments.std} if weights else {}
        found[spec] = load_classifier(
            spec, weights=weights or None, classes=len(data.classes), device="cpu", **statistics
        )
        found[spec].module.eval()
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    add_subject(parser)
    parser.add_argument("--n", type=int, default=1500)
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--also", nargs="+", default=[])
    parser.add_argument("--only", nargs="+", choices=list(CASES))
    parser.add_argument("--transfer", action="store_true")
    arguments = parser.parse_args()
    data = load_data(arguments.data, n=arguments.n + arguments.train, root=arguments.data_root)
    others = others_of(arguments, data)
    clf = subject_model(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        path = arguments.out / f"{name}.json"
        if name not in (arguments.only or (name,)) or (
            arguments.transfer != path.exists() and not arguments.only
        ):
            continue
        if arguments.transfer:
            write_json(path, transfer(path, case, data, others, arguments.train))
            print(
                f"{name}: "
                + ", ".join(
                    f"{row['model']} {row['success_rate']:.3f}" for row in read_json(path)["transfer"]
                )
            )
            continue
        run = measure(case, clf, data, others, arguments.train)
        run.change.save(path.with_suffix(".safetensors"))
        if run.is_patch:
            run.change.save_png(path.with_suffix(".png"), width_mm=50, dpi=150, smooth=False)
        write_json(path, record_of(run, case, clf))
        print(
            f"{name}: {run.summary['success_rate']:.3f} of {run.summary['attempted']} in {run.summary['seconds']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
