"""Our standard suite against AutoAttack as published, composed from torchattacks' parts, component by component."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.classifier import Classifier, misclassified
from robust.evaluate import evaluate
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    allowance,
    alternate,
    brief,
    fresh,
    ratios,
    spread,
)
from robust.experiments.benchmarks.peers import (
    PEERS,
    Peer,
    Plain,
    available,
    quiet,
    torchattacks_part,
)
from robust.experiments.verdicts.reference import BATCH, PARTS
from robust.threat import Linf
from robust.twin import Precision
from robust.verdict import Verdict

# (part, plain model, its number of classes, x, y, eps, seed) -> which fall
Part = Callable[[str, Plain, int, Tensor, Tensor, float, int], Tensor]
PEER = "torchattacks"


@dataclass(frozen=True)
class Found:
    """What a suite left: (N,) bool robust, and per component its seconds, attempts and hits."""

    robust: Tensor
    parts: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Standard(Benchmark):
    """The standard suite against AutoAttack as published (from torchattacks), by component, with both verdicts.

    Attributes:
        libraries: where the peer is looked for.
        part: one component of the peer on a batch.
    """

    name: ClassVar[str] = "standard"
    peers: ClassVar[tuple[str, ...]] = (PEER,)
    samples: ClassVar[int] = 64
    rounds: ClassVar[int] = 1
    eps: ClassVar[str | None] = None
    modes: ClassVar[tuple[Precision, ...]] = ("auto",)
    libraries: Mapping[str, Peer] = field(default_factory=lambda: {PEER: PEERS[PEER]})
    part: Part = torchattacks_part

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        clf, x, y = work.load()
        x, y = x.to(clf.device), y.to(clf.device)
        clf.check(x)
        plain, classes = Plain(clf), clf.classes
        here, skipped = available(self.libraries, work.only, clf.bounds)
        for line in skipped.values():
            work.say(line)
        modes = work.modes or self.modes
        found: dict[str, Found] = {}
        entries = [_ours(fresh(clf), x, y, work, mode, found) for mode in modes]
        theirs = [
            Contestant(
                name, lambda: composed(plain, classes, x, y, work, self.part), check=_noted(name, found)
            )
            for name in here
        ]
        timings, order = alternate([*entries, *theirs], work.repeats, clf.device, work.say)
        comparison = {}
        for name in here:
            for mode in modes:
                comparison[mode] = compare(found[mode].robust, found[name].robust)
                if comparison[mode]["excess"] > allowance(len(y)):
                    timings[mode]["refused"] = f"weaker: {len(comparison[mode]['missed'])} missed"
        pairs = {str(mode): name for mode in modes for name in here if "refused" not in timings[mode]}
        return {
            "model": {"name": clf.name, "digest": clf.digest(), "n": len(x), "shape": list(x.shape[1:])},
            "contestants": timings,
            "order": order,
            "ratios": ratios(timings, pairs),
            "comparison": comparison,
            "skipped": skipped,
        }

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        heads = ["standard suite", *PARTS, "whole, seconds", "first call", "robust", "faster"]
        rows = []
        for name, one in record["contestants"].items():
            cells = [_cell(one["parts"].get(part)) for part in PARTS]
            whole = sorted(one["seconds"])[len(one["seconds"]) // 2]
            ratio = record["ratios"].get(name)
            said = one.get("refused", "") if ratio is None else spread(ratio)
            rest = [brief(whole), brief(one["first_seconds"]), f"{one['robust_accuracy']:.1%}", said]
            rows.append([name, *cells, *rest])
        return heads, rows


def _cell(part: Mapping[str, float] | None) -> str:
    if part is None:
        return ""
    return f"{brief(part['seconds'])} s, {int(part['broken'])} of {int(part['attempted'])}"


def compare(ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """Samples that ours call robust and the peer broke ("missed"), the other way round ("beyond"), and the excess.

    Args:
        ours, theirs: (N,) bool.
    """
    return {
        "missed": (ours & ~theirs).nonzero()[:, 0].tolist(),
        "beyond": (~ours & theirs).nonzero()[:, 0].tolist(),
        "excess": float(ours.float().mean() - theirs.float().mean()),
    }


def composed(plain: Plain, classes: int, x: Tensor, y: Tensor, work: Work, part: Part) -> Found:
    """The peer's components in AutoAttack's order, each on the survivors of those before."""
    with quiet():
        with torch.no_grad():
            alive = torch.cat([~misclassified(plain(some), there) for some, there in _batches(x, y)])
        parts = {}
        for name in PARTS:
            begun, broken = time.perf_counter(), 0
            rows = alive.nonzero()[:, 0]
            for batch in rows.split(BATCH) if len(rows) else ():
                fell = part(name, plain, classes, x[batch], y[batch], work.eps, work.seed)
                alive[batch[fell.to(batch.device)]] = False
                broken += int(fell.sum())
            seconds = time.perf_counter() - begun
            parts[name] = {"seconds": seconds, "attempted": len(rows), "broken": broken}
    return Found(alive.cpu(), parts)


def _batches(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def _ours(
    clf: Classifier, x: Tensor, y: Tensor, work: Work, mode: Precision, found: dict[str, Found]
) -> Contestant:
    """Our suite in one precision; its evidence is checked before anything else counts."""
    clf.check(x)

    def call() -> Verdict:
        return evaluate(clf, x, y, threat=Linf(work.eps), suite="standard", seed=work.seed, precision=mode)

    def check(verdict: Verdict) -> dict[str, Any]:
        prove(verdict, clf, x, y, work.eps)
        parts: dict[str, dict[str, float]] = {}
        for stage in verdict.manifest["stages"]:
            into = parts.setdefault(stage["attack"], {"seconds": 0.0, "attempted": 0, "broken": 0})
            into["seconds"] += stage["cost"]["seconds"]
            into["attempted"] += stage["attempted"]
            into["broken"] += stage["broken"]
        found[mode] = Found(verdict.robust.cpu(), parts)
        return {"robust_accuracy": verdict.robust_accuracy, "parts": parts, "cost": dict(verdict.cost)}

    return Contestant(mode, call, ours=True, check=check)


def prove(verdict: Verdict, clf: Classifier, x: Tensor, y: Tensor, eps: float) -> None:
    """Raises `WrongResult` unless every broken sample has a point in the ball that the plain model gets wrong."""
    broken = torch.tensor([name is not None for name in verdict.broken_by])
    points = verdict.points(x)
    inside = Linf(eps).inside(points, x.cpu().float(), clf.bounds)
    logits = torch.cat([clf.logits(part) for part in points.split(64)]).cpu()
    holds = inside & misclassified(logits, y.cpu())
    if bool((broken & ~holds).any()):
        raise WrongResult(
            f"{int((broken & ~holds).sum())} of {int(broken.sum())} broken samples have no valid example"
        )


def _noted(name: str, found: dict[str, Found]) -> Callable[[Found], dict[str, Any]]:
    """Keeps what a peer found, and returns its facts."""

    def check(result: Found) -> dict[str, Any]:
        found[name] = result
        return {"robust_accuracy": float(result.robust.float().mean()), "parts": result.parts}

    return check
