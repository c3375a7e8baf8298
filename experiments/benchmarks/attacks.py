"""PGD against the peers: the same steps on the same points, and how robust each finds the model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from robust.attacks.base import Result, Until
from robust.attacks.whitebox.pgd import PGD
from robust.classifier import Classifier, clear, misclassified
from robust.errors import first_line
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    allowance,
    alternate,
    fastest,
    fresh,
    ratios,
    timing_row,
)
from robust.experiments.benchmarks.peers import PEERS, Descent, Peer, Plain, Points, available, quiet
from robust.threat import Linf
from robust.twin import Precision

STEPS = 20
BATCHES = (32, 64, 256)
UNTILS: tuple[Until, ...] = ("strongest", "broken")
_BROKEN = ", until broken"


@dataclass(frozen=True)
class Attacks(Benchmark):
    """PGD-20 in linf against torchattacks, Foolbox and ART, in every precision, compiling told apart.

    Attributes:
        libraries: the peers to measure against.
        faint: the second radius, as a fraction of eps, at which robust accuracies are compared.
        batches: the peers' batch sizes, of which a probe finds the fastest.
    """

    name: ClassVar[str] = "attacks"
    peers: ClassVar[tuple[str, ...]] = tuple(PEERS)
    libraries: Mapping[str, Peer] = field(default_factory=lambda: PEERS)
    faint: float = 1 / 16
    batches: tuple[int, ...] = BATCHES

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        clf, x, y = work.load()
        subject = _Subject(clf, x.to(clf.device, torch.float32), y.to(clf.device))
        libraries, skipped = available(self.libraries, work.only, clf.bounds)
        rivals, probes = self._rivals(work, subject, libraries, skipped)
        for line in skipped.values():
            work.say(line)
        modes = work.modes or self.modes
        entries = [_ours(subject, work, mode, until) for until in UNTILS for mode in modes]
        if "bfloat16" in modes:  # what auto leaves out where the work does not repay compiling
            entries.append(_ours(subject, work, "bfloat16", "strongest", compiled=True))
        theirs = [_theirs(subject, work.eps, name, points) for name, points in rivals.items()]
        timings, order = alternate([*entries, *theirs], work.repeats, clf.device, work.say)
        self._faint(work, subject, timings, modes, {name: probes[name]["best"] for name in rivals}, libraries)
        for name, probe in probes.items():
            timings[name]["batch"] = probe["best"]
        against = fastest(timings, list(rivals))
        refuse(timings, list(rivals), len(x))
        pairs = {e.name: against for e in entries if against and "refused" not in timings[e.name]}
        return {
            "model": {"name": clf.name, "digest": clf.digest(), "n": len(x), "shape": list(x.shape[1:])},
            "attack": {"steps": STEPS, "step_size": _step(work.eps), "faint_eps": work.eps * self.faint},
            "contestants": timings,
            "order": order,
            "ratios": ratios(timings, pairs),
            "probes": probes,
            "skipped": skipped,
        }

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        radii = (record["settings"]["eps"], record["attack"]["faint_eps"])
        against = next((ratio["against"] for ratio in record["ratios"].values()), "the peers")
        heads = ["PGD-20", "seconds", "first call", f"faster than {against}", "with the first call"]
        heads += [f"robust at {255 * eps:.3g}/255" for eps in radii]
        rows = []
        for name, one in record["contestants"].items():
            robust = [one.get("robust_accuracy"), one.get("faint_robust_accuracy")]
            rows.append(
                [*timing_row(record, name), *("" if value is None else f"{value:.1%}" for value in robust)]
            )
        return heads, rows

    def _rivals(
        self, work: Work, subject: _Subject, libraries: Mapping[str, Peer], skipped: dict[str, str]
    ) -> tuple[dict[str, Points], dict[str, Any]]:
        """The peers' attacks at their fastest batch sizes, with the probes; one that fails is skipped with a line."""
        rivals: dict[str, Points] = {}
        probes: dict[str, Any] = {}
        for name, peer in libraries.items():
            try:
                probes[name] = subject.probe(peer, work.eps, self.batches)
                rivals[name] = subject.build(peer, work.eps, STEPS, probes[name]["best"])
            except Exception as error:  # noqa: BLE001  another library's code, which may raise anything
                probes.pop(name, None)
                skipped[name] = f"{name} fails: {first_line(error)}"
        return rivals, probes

    def _faint(
        self,
        work: Work,
        subject: _Subject,
        timings: dict[str, Any],
        modes: tuple[Precision, ...],
        batches: Mapping[str, int],
        libraries: Mapping[str, Peer],
    ) -> None:
        """Robust accuracies at the second radius, where the attacks' strength shows."""
        eps = work.eps * self.faint
        for mode in modes:
            facts = subject.judge(_pgd(subject, eps, mode, "strongest", work.seed), eps)
            timings[mode]["faint_robust_accuracy"] = facts["robust_accuracy"]
        for name, batch in batches.items():
            points = subject.build(libraries[name], eps, STEPS, batch)(subject.x, subject.y)
            timings[name]["faint_robust_accuracy"] = subject.robust(points, eps)[0]
        work.say(f"robust accuracies at {255 * eps:.3g}/255 done")


def refuse(timings: dict[str, Any], rivals: list[str], n: int) -> None:
    """Marks ours that leave clearly more standing than a peer does at either radius: they get no ratio."""
    for key in ("robust_accuracy", "faint_robust_accuracy"):
        floor = min((timings[name][key] for name in rivals), default=1.0)
        for one in timings.values():
            if one["ours"] and key in one and one[key] > floor + allowance(n):
                one["refused"] = f"weaker: {one[key]:.1%} stand, {floor:.1%} under a peer"


class _Subject:
    """The model under attack, seen as itself and as the plain module that judges and that peers get."""

    def __init__(self, clf: Classifier, x: Tensor, y: Tensor) -> None:
        self.clf, self.x, self.y = clf, x, y
        clf.check(x)
        self.plain: nn.Module = Plain(clf)

    def build(self, peer: Peer, eps: float, steps: int, batch: int) -> Points:
        """A peer's PGD."""
        descent = Descent(eps, _step(eps), steps, batch, self.clf.classes, self.clf.bounds)
        with quiet():
            return peer.pgd(self.plain, descent, tuple(self.x.shape[1:]))

    def probe(self, peer: Peer, eps: float, batches: tuple[int, ...]) -> dict[str, Any]:
        """Seconds of two steps on up to 256 points per batch size, the better of two calls, and the fastest size."""
        x, y = self.x[:256], self.y[:256]
        seconds = {}
        for batch in batches:
            points = self.build(peer, eps, 2, batch)
            calls = []
            for _ in range(2):
                begun = time.perf_counter()
                points(x, y)
                calls.append(time.perf_counter() - begun)
            seconds[str(batch)] = min(calls)
        return {"seconds": seconds, "best": min(batches, key=lambda batch: seconds[str(batch)])}

    def robust(self, points: Tensor, eps: float) -> tuple[float, int]:
        """Accuracy of the plain model on points, those outside the ball counted as unbroken, and how many are."""
        with torch.no_grad():
            logits = torch.cat([self.plain(part) for part in points.split(64)])
            clean = torch.cat([self.plain(part) for part in self.x.split(64)])
        inside = Linf(eps + 1e-6).inside(points, self.x, self.clf.bounds)
        hit = torch.where(inside, misclassified(logits, self.y), misclassified(clean, self.y))
        return float((~hit).float().mean()), int((~inside).sum())

    def judge(self, result: Result, eps: float) -> dict[str, Any]:
        """What ours found, checked: inside the ball, and every claim misclassified by the plain model."""
        points = result.x_adv
        outside = ~Linf(eps).inside(points, self.x, self.clf.bounds)
        if points.shape != self.x.shape or bool(outside.any()):
            raise WrongResult(f"{int(outside.sum())} of {len(self.x)} points of ours lie outside the ball")
        with torch.no_grad():
            logits = torch.cat([self.plain(part) for part in points.split(64)])
        right = ~misclassified(logits, self.y) & clear(logits, self.y)  # beyond float noise
        false = result.success.to(self.y.device) & right
        if int(false.sum()) > 0:
            raise WrongResult(f"{int(false.sum())} of our claims are classified correctly by the plain model")
        cost = result.cost
        return {
            "robust_accuracy": self.robust(points, eps)[0],
            "forwards": cost.forwards,
            "backwards": cost.backwards,
        }


def _step(eps: float) -> float:
    return 2.5 * eps / STEPS


def _pgd(
    subject: _Subject, eps: float, mode: Precision, until: Until, seed: int, compiled: bool | None = None
) -> Result:
    attack = PGD(threat=Linf(eps), steps=STEPS, step_size=_step(eps), until=until)
    return attack.run(subject.clf, subject.x, subject.y, seed=seed, precision=mode, compiled=compiled)


def _ours(
    subject: _Subject, work: Work, mode: Precision, until: Until, compiled: bool | None = None
) -> Contestant:
    """Our PGD in one precision, on a classifier that has learnt nothing yet."""
    own = _Subject(fresh(subject.clf), subject.x, subject.y)
    return Contestant(
        f"{mode}{', compiled' * bool(compiled)}{_BROKEN * (until == 'broken')}",
        lambda: _pgd(own, work.eps, mode, until, work.seed, compiled),
        ours=True,
        check=lambda result: own.judge(result, work.eps),
    )


def _theirs(subject: _Subject, eps: float, name: str, points: Points) -> Contestant:
    """A peer's PGD; its points count where they lie inside the ball."""

    def check(found: Tensor) -> dict[str, Any]:
        robust, outside = subject.robust(found, eps)
        return {"robust_accuracy": robust, "outside": outside}

    return Contestant(name, lambda: points(subject.x, subject.y), check=check)
