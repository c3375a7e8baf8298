"""Success and distance against queries of every black-box attack, as a record and a picture.

    python -m robust.experiments.catalogue.curves OUT.json MODEL DATA --weights FILE --mean … --std … [--queries 1000]

Fixed budgets are shown by the share of samples broken, minimum norms by the median distance. `OUT.svg` is the picture.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from robust.attacks import REGISTRY, get
from robust.digest import write_json
from robust.experiments.benchmarks.harness import conditions
from robust.experiments.catalogue.points import Subject, subject_of
from robust.experiments.verdicts.reference import add_subject
from robust.threat import make_threat

# What a panel shows: the radius of fixed budgets, none for minimum norms.
PANELS: Sequence[tuple[str, str, float | None]] = (
    ("score", "linf", 4 / 255),
    ("score", "l2", 0.5),
    ("decision", "linf", None),
    ("decision", "l2", None),
)


def grid(queries: int) -> list[int]:
    """Numbers of queries at which a curve is read: about twelve to the decade, up to `queries`."""
    steps = int(12 * math.log10(queries)) + 1
    return sorted({round(queries ** (k / steps)) for k in range(steps + 1)})


def contestants(knowledge: str, norm: str) -> list[str]:
    """The attacks of a panel: those whose changes the norm limits."""
    kinds = {name: get(name) for name in REGISTRY}
    return [
        name
        for name, kind in kinds.items()
        if kind.knowledge == knowledge and norm in kind.norms and not kind.semantic
    ]


def measure(subject: Subject, name: str, norm: str, eps: float | None, queries: int) -> dict[str, Any]:
    """The curve of one attack."""
    kind = get(name)
    smallest = kind.minimum_norm
    threat = make_threat(norm, math.inf if smallest and eps is None else eps or math.inf)
    fields: dict[str, Any] = {"queries": queries} | ({} if smallest and eps is None else {"until": "broken"})
    attack = kind(threat=threat, **fields)
    result = attack.run(subject.clf, subject.x, subject.y, track="best")
    assert result.track is not None
    curve: dict[str, Any] = result.track.against_queries(grid(queries), len(subject.x))
    curve["distance"] = [value if math.isfinite(value) else None for value in curve["distance"]]
    return {**curve, "seconds": round(result.cost.seconds, 1), "asked": result.cost.queries}


def draw(panels: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The picture: one panel a kind of knowledge and norm."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "curves"
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    styles = ("-", "--", ":", "-.")
    for panel, axis in zip(panels, axes.flat, strict=True):
        fixed = panel["eps"] is not None
        for place, (name, curve) in enumerate(panel["curves"].items()):
            values = curve["success"] if fixed else curve["distance"]
            shown = [(q, v) for q, v in zip(curve["queries"], values, strict=True) if v is not None]
            if shown:
                axis.plot(
                    *zip(*shown, strict=True), styles[place // 7 % 4], color=f"C{place % 7}", label=name
                )
        axis.set_xscale("log")
        axis.set_xlabel("queries per sample")
        if fixed:
            axis.set_ylabel("share of samples broken")
            axis.set_title(f"{panel['knowledge']}-based, {panel['norm']} {panel['eps']:.3g}")
        else:
            axis.set_yscale("log")
            axis.set_ylabel(f"median {panel['norm']} distance")
            axis.set_title(f"{panel['knowledge']}-based, smallest {panel['norm']}")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    add_subject(parser)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--queries", type=int, default=1000)
    arguments = parser.parse_args()
    subject = subject_of(arguments, arguments.n)
    panels = []
    for knowledge, norm, eps in PANELS:
        curves = {}
        for name in contestants(knowledge, norm):
            curves[name] = measure(subject, name, norm, eps, arguments.queries)
            print(
                knowledge, norm, name, curves[name]["success"][-1], curves[name]["distance"][-1], flush=True
            )
        panels.append({"knowledge": knowledge, "norm": norm, "eps": eps, "curves": curves})
    about = {
        "model": subject.clf.name,
        "digest": subject.clf.digest(),
        "n": arguments.n,
        "correct": len(subject.x),
    }
    record = {
        **conditions(subject.clf.device),
        "subject": about,
        "queries": arguments.queries,
        "panels": panels,
    }
    write_json(arguments.out, record)
    draw(panels, arguments.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
