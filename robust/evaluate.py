"""`evaluate`: the worst case of a suite of attacks on every sample, written down as it is found."""

from __future__ import annotations

import platform
import sys
import time
import warnings as python_warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.classifier import Classifier, RobustWarning
from robust.cost import Cost
from robust.decide import DRAWS, Decision, decide
from robust.digest import sample_digest
from robust.doubts import StageFacts
from robust.errors import DataError, RobustError, ThreatError
from robust.finish import finish
from robust.journal import Journal, Record
from robust.oracle import Oracle
from robust.registry import room
from robust.rows import Source, as_source
from robust.suites import Stage, stages
from robust.threat import Threat
from robust.verdict import Samples, Verdict

Progress = Callable[[float, str], None]
_CHUNK_ELEMENTS = 3 << 16


@dataclass(frozen=True)
class Plan:
    """Everything that fixes the outcome of a run; a resumed run must have the same."""

    model: Classifier | Oracle
    source: Source
    threats: list[Threat]
    suite: str
    stages: list[Stage]
    seed: int
    chunk: int
    started: str

    @property
    def radii(self) -> list[float]:
        """The radii in ascending order."""
        return [float(torch.as_tensor(threat.eps)) for threat in self.threats]

    def describe(self) -> dict[str, Any]:
        """What `--resume` compares."""
        return {
            "model": model_digest(self.model),
            "n": len(self.source),
            "norm": self.threats[0].norm,
            "eps": self.radii,
            "suite": self.suite,
            "stages": [{"attack": stage.attack, **stage.params} for stage in self.stages],
            "seed": self.seed,
            "chunk": self.chunk,
        }


def model_digest(model: Classifier | Oracle) -> str:
    """A classifier's hash; of an oracle only its name is known."""
    if isinstance(model, Classifier):
        return model.digest()
    backend = model.backend
    return backend.digest() if isinstance(backend, Classifier) else f"oracle:{model.name}"


def evaluate(
    model: Classifier | Oracle,
    x: Any,
    y: Tensor | None = None,
    *,
    threat: Threat | Sequence[Threat],
    suite: str | Sequence[str] = "standard",
    seed: int = 0,
    out: str | Path | None = None,
    resume: bool = False,
    chunk: int | None = None,
    report: bool = True,
    progress: Progress | None = None,
) -> Verdict:
    """The robustness verdict of a model on data.

    A sample counts as broken only if its stored example lies inside the threat and the original model, in float32,
    misclassifies it.

    Args:
        model: a Classifier, or an Oracle with a suite that needs no gradients.
        x: (N, C, H, W) in the model's box with labels y (N,), or indexable pairs (x, y); read a chunk at a time.
        threat: one threat, or several of one norm for a curve; the verdict's headline is the largest.
        suite: "quick", "standard", "rand", "score", or attacks' names.
        seed: keys all randomness; the verdict does not depend on interruption or order.
        out: a run folder to write continuously; it must be new, or hold the run to `resume`.
        chunk: samples per journal group; chosen from their size if None.
        report: whether to write report.html into `out`.
        progress: called with the fraction done and a line of text.

    Raises:
        RobustError: bad input, in one line; nothing is written then.
    """
    source = as_source(x, y)
    threats = _ascending(threat)
    name, plan_stages = stages(suite, threats[0].norm, isinstance(model, Oracle))
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore", RobustWarning)
        shape = _first_look(model, source, threats)
        size = chunk or max(32, min(256, _CHUNK_ELEMENTS // max(shape.numel(), 1)))
        started = datetime.now(UTC).isoformat(timespec="seconds")
        plan = Plan(model, source, threats, name, plan_stages, seed, size, started)
        folder = None if out is None else Path(out)
        if folder is not None and resume and (folder / "digests.json").exists():
            return _finished(plan, folder)
        journal = Journal(folder, plan.describe(), resume)
        _Run(plan, journal, progress or _silent).run()
        return finish(plan, journal, environment(plan), report)


def _finished(plan: Plan, folder: Path) -> Verdict:
    """A finished run asked to resume is returned as it is, if it is the same run."""
    verdict = Verdict.load(folder)
    stored = {key: verdict.manifest["plan"].get(key) for key in plan.describe()}
    Journal._same(stored, plan.describe())
    return verdict


def _silent(fraction: float, text: str) -> None:
    """No progress wanted."""


def _ascending(threat: Threat | Sequence[Threat]) -> list[Threat]:
    threats = [threat] if isinstance(threat, Threat) else list(threat)
    if not threats or len({item.norm for item in threats}) != 1:
        raise ThreatError("give one threat, or several of one norm")
    for item in threats:
        if torch.as_tensor(item.eps).dim():
            raise ThreatError("a verdict has one eps for all samples; attacks take one per sample")
        if not item.bounded:
            raise ThreatError(f"a verdict needs a finite eps, such as {type(item).__name__}(0.5)")
    threats.sort(key=lambda item: float(torch.as_tensor(item.eps)))
    radii = [float(torch.as_tensor(item.eps)) for item in threats]
    if len(set(radii)) != len(radii):
        raise ThreatError(f"eps is given twice: {radii}")
    return threats


def _first_look(model: Classifier | Oracle, source: Source, threats: list[Threat]) -> torch.Size:
    """Checks box, threat and model on the first samples, before anything is written."""
    for threat in threats:
        threat.check(model.bounds)
    x, y = source.batch(range(min(16, len(source))))
    if isinstance(model, Classifier):
        model.check(x)
        if len(y) and int(y.max()) >= model.classes:
            raise DataError(f"y holds the class {int(y.max())}, the model has {model.classes}")
    return x.shape[1:]


class _Run:
    """One pass over all groups that the journal does not hold yet."""

    def __init__(self, plan: Plan, journal: Journal, progress: Progress) -> None:
        self.plan, self.journal, self.progress = plan, journal, progress
        self.chunks = -(-len(plan.source) // plan.chunk)
        self.weights = [_work(stage) for stage in plan.stages] * len(plan.threats)

    def run(self) -> None:
        for number in range(self.chunks):
            self._chunk(number)
        self.progress(1.0, "done")

    def _chunk(self, number: int) -> None:
        plan = self.plan
        start = number * plan.chunk
        rows = range(start, min(start + plan.chunk, len(plan.source)))
        keys = [f"{number}/clean"]
        keys += [f"{number}/{eps!r}/{k}" for eps in plan.radii for k in range(len(plan.stages))]
        if all(key in self.journal.groups for key in keys):
            return
        x, y = plan.source.batch(rows)
        if isinstance(plan.model, Classifier):
            plan.model.require_box(x)
        if keys[0] not in self.journal.groups:
            self._clean(keys[0], rows, x, y)
        alive = torch.tensor([record["correct"] for record in self.journal.groups[keys[0]]])
        steps = [(threat, k) for threat in plan.threats for k in range(len(plan.stages))]
        for position, (key, (threat, k)) in enumerate(zip(keys[1:], steps, strict=True)):
            if key not in self.journal.groups:
                self._tell(number, position, 0.0, plan.stages[k].attack)
                self._stage(key, k, threat, rows, x, y, alive, (number, position))
            for record in self.journal.groups[key]:
                alive[record["i"] - start] = False

    def _clean(self, key: str, rows: range, x: Tensor, y: Tensor) -> None:
        begun, before = time.perf_counter(), _spent(self.plan.model)
        decision = outcome(self.plan.model, x, y, torch.tensor(list(rows)), self.plan.seed)
        cost = _spent(self.plan.model) - before
        cost.seconds = time.perf_counter() - begun
        records = [
            {
                "i": i,
                "y": int(y[k]),
                "x": sample_digest(x[k], int(y[k])),
                "prediction": int(decision.prediction[k]),
                "confidence": round(float(decision.confidence[k]), 6),
                "correct": not bool(decision.hit[k]),
                "marginal": not bool(decision.sure[k]),
            }
            for k, i in enumerate(rows)
        ]
        commit = {"key": key, "attack": "clean", "eps": 0.0, "attempted": len(rows), "broken": 0}
        self.journal.commit({**commit, "cost": cost.to_dict(), "notes": {}}, records, *_nothing())

    def _stage(
        self, key: str, k: int, threat: Threat, rows: range, x: Tensor, y: Tensor, alive: Tensor, at: tuple[int, int]
    ) -> None:
        """Runs one attack on the chunk's survivors and commits what it broke."""
        plan, stage = self.plan, self.plan.stages[k]
        live = alive.nonzero()[:, 0]
        index = torch.tensor(list(rows))[live]
        begun, before = time.perf_counter(), _spent(plan.model)
        attack = room("attacks").load(stage.attack)(threat=threat, until="broken", **stage.params)
        notes: dict[str, float] = {}
        if len(live):
            hook = _Hook(self, at, stage.attack)
            result = attack.run(plan.model, x[live], y[live], seed=plan.seed, index=index, progress=hook)
            notes = result.notes
            records, kept = self._confirm(attack, stage, threat, x[live], y[live], index, result)
        else:
            records, kept = [], _nothing()
        cost = _spent(plan.model) - before
        cost.seconds = time.perf_counter() - begun
        commit = {"key": key, "attack": stage.attack, "eps": float(torch.as_tensor(threat.eps))}
        commit |= {"attempted": len(live), "broken": len(records), "cost": cost.to_dict(), "notes": notes}
        self.journal.commit(commit, records, *kept)

    def _confirm(
        self, attack: Any, stage: Stage, threat: Threat, x: Tensor, y: Tensor, index: Tensor, result: Any
    ) -> tuple[list[Record], tuple[Tensor, Tensor]]:
        """The claims that hold: the stored point, in the ball and misclassified by the original model."""
        model = self.plan.model
        points = result.x_adv.detach().cpu().float()
        claimed = result.success.nonzero()[:, 0]
        if not len(claimed):
            return [], _nothing()
        points, x, y, index = points[claimed], x[claimed].cpu().float(), y[claimed], index[claimed]
        decision = outcome(model, points, y, index, self.plan.seed)
        holds = decision.hit.cpu() & threat.inside(points, x, model.bounds)
        distance = threat.distance(points, x)
        records = [
            {
                "i": int(index[k]),
                "broken_by": stage.attack,
                "eps": float(torch.as_tensor(threat.eps)),
                "distance": float(distance[k]),
                "prediction": int(decision.prediction[k]),
                "confidence": round(float(decision.confidence[k]), 6),
                "marginal": not bool(decision.sure[k]),
            }
            for k in holds.nonzero()[:, 0].tolist()
        ]
        return records, (index[holds], points[holds])

    def _tell(self, number: int, position: int, fraction: float, attack: str) -> None:
        total = sum(self.weights)
        inside = (sum(self.weights[:position]) + self.weights[position] * fraction) / max(total, 1e-12)
        done = min((number + inside) / max(self.chunks, 1), 1.0)
        last = min((number + 1) * self.plan.chunk, len(self.plan.source))
        self.progress(done, f"{attack}, samples to {last} of {len(self.plan.source)}")


@dataclass(frozen=True)
class _Hook:
    """Passes an attack's own progress on as a part of the run's."""

    run: _Run
    at: tuple[int, int]
    attack: str

    def __call__(self, fraction: float) -> None:
        self.run._tell(*self.at, fraction, self.attack)


def outcome(model: Classifier | Oracle, x: Tensor, y: Tensor, index: Tensor, seed: int) -> Decision:
    """`decide` for a classifier; for an oracle the answers it gives, which count as queries."""
    if isinstance(model, Classifier):
        return decide(model, x, y, index=index, seed=seed)
    prediction = model.labels(x).cpu()
    hit = prediction != y.cpu()
    return Decision(hit, torch.ones_like(hit), prediction, torch.full((len(x),), float("nan")).nan_to_num(0.0))


def _work(stage: Stage) -> float:
    """A stage's share of the work on a sample that survives, in model passes."""
    passes = float(stage.params.get("queries", 3 * stage.params.get("steps", 20)))
    for factor in ("n_targets", "restarts", "copies"):
        passes *= stage.params.get(factor, 1)
    return passes


def _spent(model: Classifier | Oracle) -> Cost:
    spent = model.cost + Cost()
    if isinstance(model, Oracle) and isinstance(model.backend, Classifier):
        spent.forwards = model.backend.cost.forwards
    return spent


def _nothing() -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.long), torch.zeros(0)


def environment(plan: Plan) -> dict[str, Any]:
    """Versions, device and command, for the manifest."""
    import numpy

    from robust import __version__

    device = plan.model.device
    return {
        "versions": {
            "robust": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": numpy.__version__,
        },
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
        },
        "precision": "float32",
        "draws": DRAWS if isinstance(plan.model, Classifier) and plan.model.randomised else 1,
        "command": sys.argv,
    }


def facts(plan: Plan, commits: Sequence[Record]) -> list[StageFacts]:
    """What each attack of the suite saw, summed over chunks and radii."""
    kinds = {stage.attack: room("attacks").load(stage.attack) for stage in plan.stages}
    found = {name: StageFacts(name, kind.knowledge) for name, kind in kinds.items()}
    for commit in commits:
        if commit["attack"] in found:
            fact = found[commit["attack"]]
            fact.attempted += commit["attempted"]
            fact.broken += commit["broken"]
            for name, count in commit["notes"].items():
                fact.notes[name] = fact.notes.get(name, 0.0) + count
    return list(found.values())


def samples_of(journal: Journal) -> Samples:
    """The outcomes of all groups."""
    samples = Samples()
    for records in journal.groups.values():
        for record in records:
            samples.take(record)
    if not samples.y:
        raise RobustError("no sample was evaluated")
    return samples
