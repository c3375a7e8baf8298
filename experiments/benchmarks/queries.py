"""Black-box speed: answers a second through `robust.Oracle`, and Square's proposals in every precision."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.attacks.base import Result, Until
from robust.attacks.blackbox.square import Square
from robust.classifier import Classifier, misclassified
from robust.errors import first_line
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    alternate,
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
    torchattacks_square,
)
from robust.oracle import Oracle
from robust.threat import Linf
from robust.twin import Precision

PEER = "torchattacks"


@dataclass(frozen=True)
class Queries(Benchmark):
    """Black-box answers a second through an Oracle and for Square's proposals, at batch widths 1, 16 and 64.

    Attributes:
        widths: points a call.
        answers: how many each contestant asks for.
        queries: of Square, where its strength is compared at equal queries.
    """

    name: ClassVar[str] = "queries"
    peers: ClassVar[tuple[str, ...]] = (PEER,)
    samples: ClassVar[int] = 64
    modes: ClassVar[tuple[Precision, ...]] = ("float32", "bfloat16")
    widths: tuple[int, ...] = (1, 16, 64)
    answers: int = 2048
    queries: int = 200
    libraries: Mapping[str, Peer] = field(default_factory=lambda: {PEER: PEERS[PEER]})

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        clf, x, y = work.load()
        x, y = x.to(clf.device), y.to(clf.device)
        clf.check(x)
        modes = work.modes or self.modes
        plain = Plain(clf)
        entries: list[Contestant] = []
        pairs: dict[str, str] = {}
        asked: dict[str, int] = {}
        for width in self.widths:
            calls = max(self.answers // width, 1)
            some, labels = _tile(x, width), _tile(y, width)
            bare, oracle = _bare(plain, some, calls, width), _oracle(fresh(clf), plain, some, calls, width)
            squares = [_square(fresh(clf), some, labels, calls, work, mode, width) for mode in modes]
            entries += [bare, oracle, *squares]
            pairs |= {one.name: bare.name for one in (oracle, *squares)}
            asked |= {one.name: calls * width for one in (bare, oracle, *squares)}
        timings, order = alternate(entries, work.repeats, clf.device, work.say)
        for name, timing in timings.items():
            timing["answers"] = timing.get("queries", asked[name])
            timing["per_second"] = timing["answers"] / statistics.median(timing["seconds"])
        strength, skipped = self._strength(work, clf, plain, x, y, modes)
        return {
            "model": {"name": clf.name, "digest": clf.digest(), "n": len(x), "shape": list(x.shape[1:])},
            "contestants": timings,
            "order": order,
            "ratios": ratios(timings, pairs),
            "strength": strength,
            "skipped": skipped,
        }

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        rows = []
        for name, one in record["contestants"].items():
            ratio = record["ratios"].get(name)
            rows.append([name, f"{one['per_second']:,.0f}", "" if ratio is None else spread(ratio)])
        found = record["strength"]
        for name, robust in found["robust_accuracy"].items():
            rows.append([f"robust after {found['queries']} queries: {name}", f"{robust:.1%}", ""])
        return ["black box", "answers a second", "speed of the bare module"], rows

    def _strength(
        self, work: Work, clf: Classifier, plain: Plain, x: Tensor, y: Tensor, modes: tuple[Precision, ...]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Robust accuracy after equal queries: ours in each precision, and the peer's."""
        robust: dict[str, float] = {}
        for mode in modes:
            found = _attack(clf, x, y, work, mode, self.queries, "broken")
            robust[mode] = _standing(plain, found.x_adv, x, y, work.eps)
        here, skipped = available(self.libraries, work.only, clf.bounds)
        for name in here:
            try:
                with quiet(), torch.no_grad():
                    points = torchattacks_square(plain, work.eps, self.queries, work.seed)(x, y)
                robust[name] = _standing(plain, points, x, y, work.eps)
            except Exception as error:  # noqa: BLE001  another library's code, which may raise anything
                skipped[name] = f"{name} fails: {first_line(error)}"
        return {"queries": self.queries, "robust_accuracy": robust}, skipped


def _tile(values: Tensor, width: int) -> Tensor:
    return values[torch.arange(width, device=values.device) % len(values)]


def _standing(plain: Plain, points: Tensor, x: Tensor, y: Tensor, eps: float) -> float:
    """Accuracy of the plain model on points; one outside the ball breaks nothing."""
    with torch.no_grad():
        hit = misclassified(plain(points), y) & Linf(eps + 1e-6).inside(points, x, (-torch.inf, torch.inf))
    return float((~hit).float().mean())


def _bare(plain: Plain, x: Tensor, calls: int, width: int) -> Contestant:
    """The module itself, without a graph."""

    def call() -> None:
        with torch.no_grad():
            for _ in range(calls):
                plain(x)

    return Contestant(f"bare module, {width} wide", call)


def _oracle(clf: Classifier, plain: Plain, x: Tensor, calls: int, width: int) -> Contestant:
    """An Oracle's scores, which must be the module's and be counted."""

    def call() -> tuple[Tensor, int]:
        oracle = Oracle(clf)
        for _ in range(calls):
            scores = oracle.scores(x)
        return scores, oracle.cost.queries

    def check(found: tuple[Tensor, int]) -> dict[str, Any]:
        scores, counted = found
        with torch.no_grad():
            right = plain(x)
        if counted != calls * width or not torch.allclose(scores, right, rtol=1e-4, atol=1e-4):
            raise WrongResult(
                f"the oracle counted {counted} of {calls * width} queries, or answers otherwise"
            )
        return {}

    return Contestant(f"oracle, {width} wide", call, ours=True, check=check)


def _attack(
    clf: Classifier, x: Tensor, y: Tensor, work: Work, mode: Precision, queries: int, until: Until
) -> Result:
    square = Square(threat=Linf(work.eps), queries=queries, until=until)
    return square.run(clf, x, y, seed=work.seed, precision=mode)


def _square(
    clf: Classifier, x: Tensor, y: Tensor, calls: int, work: Work, mode: Precision, width: int
) -> Contestant:
    """Square with so many queries for each point, which does not stop at a success."""
    clf.check(x)

    def check(result: Result) -> dict[str, Any]:
        if bool((~Linf(work.eps).inside(result.x_adv, x, clf.bounds)).any()):
            raise WrongResult("points of our Square lie outside the ball")
        # The clean points are asked about once, and proposals that change nothing not at all.
        if not 0.9 * calls * width <= result.cost.queries <= (calls + 1) * width:
            raise WrongResult(f"Square asked {result.cost.queries} of {calls * width} queries")
        return {"queries": result.cost.queries}

    call = lambda: _attack(clf, x, y, work, mode, calls, "strongest")  # noqa: E731
    return Contestant(f"square {mode}, {width} wide", call, ours=True, check=check)
