"""The catalogue against the peers: every family of attacks at equal steps or queries, its strength before its speed.

``python -m robust.experiments.benchmarks.catalogue OUT PART …`` joins records of some families each into one.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks import Attack
from robust.attacks.base import Result
from robust.classifier import Classifier, clear, misclassified
from robust.digest import read_json, write_json
from robust.errors import RunError, first_line
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    alternate,
    brief,
    fresh,
    timed,
)
from robust.experiments.benchmarks.peers import PEERS, Plain, available
from robust.experiments.benchmarks.rivals import RIVALS, Counting, Task, aims, rival
from robust.registry import room
from robust.threat import make_threat

OURS = "ours"
WORSE = 0.02  # how much larger our median distance may be than the best peer's, or our success smaller


@dataclass(frozen=True)
class Family:
    """One method as ours and the peers have it.

    Attributes:
        attack: our registry name; fields: its hyper-parameters beside `steps` or `queries`.
        task: what every contestant is told.
        success: compared by the success within `task.eps`, not by the median distance.
        blind: black-box: ours gets as many queries as the most frugal peer asked.
        targeted: all aim at the next class.
        samples: at most so many of the benchmark's, where a peer takes minutes a sample.
        once: libraries that are timed in one call only.
    """

    attack: str
    task: Task
    fields: Mapping[str, Any] = field(default_factory=dict)
    success: bool = False
    blind: bool = False
    targeted: bool = False
    samples: int | None = None
    once: tuple[str, ...] = ("art",)


FAMILIES: Mapping[str, Family] = {
    "deepfool": Family("deepfool", Task("l2", steps=50)),
    "deepfool-linf": Family("deepfool", Task("linf", steps=50)),
    "cw-l2": Family("cw-l2", Task("l2", steps=20, searches=5), {"search_steps": 5}),
    "ddn": Family("ddn", Task("l2", steps=100)),
    "fmn-l2": Family("fmn", Task("l2", steps=100)),
    "fmn-linf": Family("fmn", Task("linf", steps=100)),
    "fmn-l1": Family("fmn", Task("l1", steps=100)),
    "ead": Family(
        "ead", Task("l1", steps=100, searches=5), {"search_steps": 5}, once=("art", "torchattacks")
    ),
    "bb-l2": Family("bb", Task("l2", steps=100), once=("foolbox",)),
    "bb-linf": Family("bb", Task("linf", steps=100), once=("foolbox",)),
    "jsma": Family("jsma", Task("l0"), targeted=True, samples=10, once=("art", "torchattacks")),
    "hopskipjump": Family("hopskipjump", Task("l2", rounds=5), blind=True),
    "boundary": Family("boundary", Task("l2", queries=1000, rounds=20), blind=True),
    "square": Family(
        "square", Task("linf", queries=200, eps=2 / 255), {"rescale": True, "until": "broken"}, success=True
    ),
}


@dataclass(frozen=True)
class Catalogue(Benchmark):
    """Attack families against Foolbox, torchattacks and ART on the same samples.

    Attributes:
        families: what is measured.
    """

    name: ClassVar[str] = "catalogue"
    peers: ClassVar[tuple[str, ...]] = (*PEERS, *FAMILIES)
    samples: ClassVar[int] = 100
    rounds: ClassVar[int] = 1
    families: Mapping[str, Family] = field(default_factory=lambda: FAMILIES)

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`; ``--only`` names libraries, families, or both."""
        clf, x, y = work.load()
        clf.check(x)
        x, y = x.to(clf.device, torch.float32), y.to(clf.device)
        wanted = [name for name in work.only if name in PEERS]
        families = [name for name in work.only if name in self.families] or list(self.families)
        libraries, skipped = available(PEERS, wanted, clf.bounds)
        found = {}
        for name in families:
            family = self.families[name]
            count = min(len(x), family.samples or len(x))
            bout = _Bout(name, family, clf, x[:count], y[:count], work)
            found[name] = bout.run([library for library in libraries if library in RIVALS[name]])
            for library, line in bout.skipped.items():
                skipped[f"{name}/{library}"] = line
        return {
            "model": {"name": clf.name, "digest": clf.digest(), "n": len(x), "shape": list(x.shape[1:])},
            "families": found,
            "skipped": skipped,
        }

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        heads = [
            "family",
            "by",
            "ours",
            "best peer",
            "ours to it",
            "seconds",
            "its seconds",
            "faster",
            "others",
        ]
        return heads, [_row(name, one) for name, one in record["families"].items()]


def _row(name: str, one: Mapping[str, Any]) -> list[str]:
    contestants, best = one["contestants"], one["best"]
    key = "success" if one["measure"] == "success" else "median"
    shown = {who: _value(facts[key], key) for who, facts in contestants.items()}
    seconds = {who: statistics.median(facts["seconds"]) for who, facts in contestants.items()}
    by = f"success, {one['norm']} {255 * one['eps']:.3g}/255" if key == "success" else f"median {one['norm']}"
    if best is None:
        return [name, by, shown[OURS], "", "", brief(seconds[OURS]), "", "", ""]
    others = [
        f"{who} {shown[who]} in {brief(seconds[who])} s" for who in contestants if who not in (OURS, best)
    ]
    return [
        *(name, by, shown[OURS], f"{best} {shown[best]}", f"{one['excess']:+.1%}"),
        *(brief(seconds[OURS]), brief(seconds[best]), f"{one['faster']:.2f}×", "; ".join(others)),
    ]


def _value(value: float | None, key: str) -> str:
    if value is None:
        return "none"
    return f"{value:.1%}" if key == "success" else f"{value:.4g}"


class _Bout:
    """One family: ours and the peers on the same points, judged by the plain model."""

    def __init__(self, name: str, family: Family, clf: Classifier, x: Tensor, y: Tensor, work: Work) -> None:
        self.name, self.family, self.clf, self.x, self.y, self.work = name, family, clf, x, y, work
        self.task = replace(
            family.task, classes=clf.classes, bounds=clf.bounds, shape=tuple(x.shape[1:]), seed=work.seed
        )
        self.targets = aims(y, clf.classes) if family.targeted else None
        self.plain = Plain(clf)
        self.skipped: dict[str, str] = {}
        self.counters: dict[str, Counting] = {}

    def run(self, libraries: list[str]) -> dict[str, Any]:
        """The family's part of the record."""
        work, family = self.work, self.family
        theirs = {one.name: one for one in map(self._theirs, libraries) if one is not None}
        timings: dict[str, Any] = {}
        for name in list(theirs):  # once apart: what fails is skipped, and how much a peer asks is known
            facts = self._first(theirs[name])
            if facts is None:
                del theirs[name]
            else:
                timings[name] = facts
        queries = self._queries(timings)
        quick = [one for name, one in theirs.items() if name not in family.once]
        found, _ = alternate([self._ours(queries), *quick], work.repeats, self.clf.device)
        for name, timing in found.items():
            timings[name] = {**timings.get(name, {}), **timing}
        best = self._best(timings)
        facts = {
            "attack": family.attack,
            "norm": self.task.norm,
            "measure": "success" if family.success else "distance",
            "eps": self.task.eps,
            "steps": self.task.steps,
            "searches": self.task.searches,
            "queries": queries,
            "n": len(self.x),
            "contestants": timings,
            "best": best,
        }
        if best is not None:
            facts |= self._against(timings, best)
        work.say(f"{self.name}: " + ", ".join(_row(self.name, facts)[2:8]))
        return facts

    def _first(self, one: Contestant) -> dict[str, Any] | None:
        try:
            seconds, cpu, points = timed(one, self.clf.device)
        except Exception as error:  # noqa: BLE001  another library's code, which may raise anything
            self.skipped[one.name] = f"{self.name}: {one.name} fails: {first_line(error)}"
            self.work.say(self.skipped[one.name])
            return None
        assert one.check is not None
        asked = self.counters[one.name].asked / len(self.x)
        self.work.say(f"{self.name}: {one.name} took {seconds:.1f} s")
        facts = {"ours": False, "seconds": [seconds], "cpu_seconds": [cpu], "first_seconds": seconds}
        return {**facts, "asked": asked, **one.check(points)}

    def _queries(self, timings: Mapping[str, Any]) -> int | None:
        """Queries a sample for ours: of a black-box family, what the most frugal peer asked."""
        if not self.family.blind:
            return self.task.queries if self.family.success else None
        return int(min((facts["asked"] for facts in timings.values()), default=self.task.queries))

    def _theirs(self, library: str) -> Contestant | None:
        counter = self.counters[library] = Counting(self.clf)
        try:
            points = rival(self.name, library, counter, self.task)
        except Exception as error:  # noqa: BLE001  another library's code, which may raise anything
            self.skipped[library] = f"{self.name}: {library} fails: {first_line(error)}"
            return None
        return Contestant(library, lambda: points(self.x, self.y), check=self._judge)

    def _ours(self, queries: int | None) -> Contestant:
        clf, task = fresh(self.clf), self.task
        kind = room("attacks").load(self.family.attack)
        fields = dict(self.family.fields)
        if queries is not None:
            fields["queries"] = queries
        elif "steps" in kind.__dataclass_fields__ and task.norm != "l0":
            fields["steps"] = task.steps
        threat = make_threat(task.norm, task.eps if task.eps is not None else float("inf"))
        attack: Attack = kind(threat=threat, **fields)

        def call() -> Result:
            return attack.run(clf, self.x, self.y, targets=self.targets, seed=self.work.seed)

        def check(result: Result) -> dict[str, Any]:
            return {**self._honest(result), **self._judge(result.x_adv)}

        return Contestant(OURS, call, ours=True, check=check)

    def _honest(self, result: Result) -> dict[str, Any]:
        """Ours must claim nothing that the plain model denies."""
        logits = self._logits(result.x_adv)
        denied = ~misclassified(logits, self.y, self.targets) & clear(logits, self.y, self.targets)
        false = int((result.success.to(denied.device) & denied).sum())
        if false:
            raise WrongResult(f"{self.name}: {false} of our claims are denied by the plain model")
        cost = result.cost
        asked = None if result.queries is None else float(result.queries.float().mean())
        return {"forwards": cost.forwards, "backwards": cost.backwards, "asked": asked}

    def _logits(self, points: Tensor) -> Tensor:
        with torch.no_grad():
            return torch.cat([self.plain(part) for part in points.split(50)])

    def _judge(self, points: Tensor) -> dict[str, Any]:
        """Success on the plain model inside box and radius, and the median distance; a clean success counts as 0."""
        hit = misclassified(self._logits(points), self.y, self.targets)
        clean = misclassified(self._logits(self.x), self.y, self.targets)
        low, high = self.clf.bounds
        boxed = (points >= low - 1e-6).flatten(1).all(1) & (points <= high + 1e-6).flatten(1).all(1)
        distance = make_threat(self.task.norm, float("inf")).distance(points, self.x)
        if self.task.eps is not None:
            hit &= distance <= self.task.eps + 1e-6
        reached = torch.where(hit & boxed, distance, torch.inf)
        reached = torch.where(clean, 0.0, reached)
        median = float(reached.median())
        success = float(reached.isfinite().float().mean())
        return {"success": success, "median": median if math.isfinite(median) else None}

    def _best(self, timings: Mapping[str, Any]) -> str | None:
        """The strongest peer; of equals within WORSE, the fastest."""
        names = [name for name in timings if name != OURS]
        if not names:
            return None
        losses = {name: self._loss(timings[name]) for name in names}
        floor = min(losses.values())
        close = [name for name in names if losses[name] <= floor * (1 + WORSE)] or names
        return min(close, key=lambda name: statistics.median(timings[name]["seconds"]))

    def _loss(self, facts: Mapping[str, Any]) -> float:
        """Smaller is stronger: the median distance, or the share that stands."""
        if self.family.success:
            return float(1 - facts["success"])
        return math.inf if facts["median"] is None else float(facts["median"])

    def _against(self, timings: Mapping[str, Any], best: str) -> dict[str, float]:
        floor = min(self._loss(facts) for name, facts in timings.items() if name != OURS)
        ours = self._loss(timings[OURS])
        excess = ours - floor if self.family.success else ours / floor - 1 if 0 < floor < math.inf else 0.0
        a, b = (statistics.median(timings[name]["seconds"]) for name in (OURS, best))
        return {"excess": excess, "faster": b / a}


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of all families, from records of some each that were made on one machine.

    Every family says by which commit it was measured; the record's own is that of the first part.

    Raises:
        RunError: their conditions differ, or a family stands in two.
    """
    whole = {**parts[0], "families": {}, "skipped": {}}
    for part in parts:
        for key in ("benchmark", "device", "versions", "settings", "model"):
            if part[key] != whole[key]:
                raise RunError(f"the records' {key} differ: {whole[key]} and {part[key]}")
        if again := whole["families"].keys() & part["families"].keys():
            raise RunError(f"{', '.join(sorted(again))}: in two of the records")
        whole["families"] |= {
            name: {"commit": part["commit"], **facts} for name, facts in part["families"].items()
        }
        whole["skipped"] |= part["skipped"]
        whole["date"] = max(whole["date"], part["date"])
    whole["families"] = {name: whole["families"][name] for name in FAMILIES if name in whole["families"]}
    return whole


if __name__ == "__main__":
    out, *names = sys.argv[1:]
    write_json(Path(out), merge([read_json(Path(name)) for name in names]))
