"""`evaluate`: the worst case of a suite of attacks on every sample, written down as it is found."""

from __future__ import annotations

import warnings as python_warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.adaptive import KINDS, run_unaware
from robust.answers import AnswerLog
from robust.claim import claiming
from robust.classifier import Classifier, RobustWarning
from robust.cost import Cost
from robust.decide import outcome
from robust.defense import Defended
from robust.digest import sample_digest
from robust.errors import BudgetExceeded, RunError
from robust.finish import finish
from robust.journal import PREPARED, Journal, Record, require_same, sweep
from robust.oracle import Oracle, counted
from robust.plan import Plan, make_plan
from robust.rows import as_source, check_samples
from robust.suites import Stage
from robust.threat import Threat
from robust.twin import Precision
from robust.verdict import Verdict

Progress = Callable[[float, str], None]


@claiming
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
    precision: Precision = "auto",
    surrogates: Sequence[Classifier] = (),
    report: bool = True,
    progress: Progress | None = None,
    command: Sequence[str] | None = None,
) -> Verdict:
    """The robustness verdict of a model on data.

    A sample counts as broken only if its stored example lies inside the threat and the original model, in float32,
    misclassifies it. A defended model (`robust.defense`) is attacked as its defences declare, and what an attack that
    does not know of them would have claimed stands beside it (`Verdict.non_adaptive`).

    Args:
        model: a Classifier, or an Oracle with a suite that needs no gradients.
        x: (N, C, H, W) in the model's box with labels y (N,), or indexable pairs (x, y); read a chunk at a time.
        threat: one threat, or several of one norm for a curve; the verdict's headline is the largest.
        suite: "quick", "standard", "rand", "score", "decision", "transfer", "full", or attacks' names.
        seed: keys all randomness; the verdict does not depend on interruption or order.
        out: a run folder to write continuously; it must be new, or hold the run to `resume`.
        resume: go on with the run in `out`. What was sent to a model elsewhere (a `Remote` backend) stays spent, and
            its answers are used again; other oracles answer a group that was cut off anew, at no charge.
        chunk: samples per journal group; chosen from their size if None.
        precision: "float32": a faster twin of the model (`robust.twin`) answers the attacks; "bfloat16": a bfloat16
            twin scouts before it; "auto": what the run repays; "original": the model answers itself. It never decides.
        surrogates: models of the same classes and box for the suites "transfer" and "full" to craft on. Without any, a
            substitute is distilled from the model's answers to the data, without its labels, once a run.
        report: whether to write report.html into `out`.
        progress: called with the fraction done and a line of text.
        command: what the manifest names as the command of this run; None for this process's.

    Raises:
        RobustError: bad input, in one line; nothing is written then.
    """
    if resume and out is None:
        raise RunError("resume needs out, the folder of the run to go on with")
    source = as_source(x, y)
    with python_warnings.catch_warnings():
        python_warnings.simplefilter("ignore", RobustWarning)
        plan = make_plan(model, source, threat, suite, seed, chunk, precision, surrogates, command)
        folder = None if out is None else Path(out)
        if folder is not None and resume and (folder / "digests.json").exists():
            return _finished(plan, folder)
        journal = Journal(folder, plan.describe(), resume)
        _charge(model, journal)
        _Run(plan, journal, progress or _silent).run()
        return finish(plan, journal, report)


def _finished(plan: Plan, folder: Path) -> Verdict:
    """A finished run asked to resume is returned as it is, if it is the same run."""
    verdict = Verdict.load(folder)
    require_same(verdict.manifest["plan"], plan.describe())
    sweep(folder)
    return verdict


def _charge(model: Classifier | Oracle, journal: Journal) -> None:
    """What the journal's groups cost is gone from an oracle's budget, whichever process asked."""
    if isinstance(model, Oracle):
        model.cost.queries = max(model.cost.queries, journal.cost().queries)
        model.repeated = max(model.repeated, journal.repeated())


def _silent(fraction: float, text: str) -> None:
    """No progress wanted."""


@dataclass(frozen=True)
class _Chunk:
    """Samples that go through the suite together."""

    number: int
    rows: range
    x: Tensor
    y: Tensor


class _Run:
    """One pass over all groups that the journal does not hold yet."""

    def __init__(self, plan: Plan, journal: Journal, progress: Progress) -> None:
        self.plan, self.journal, self.progress = plan, journal, progress
        self.steps = plan.steps()
        self.weights = [stage.passes() for _, stage in self.steps]
        model, out = plan.model, journal.out
        self.remote = model if isinstance(model, Oracle) and model.remote else None
        self.log = AnswerLog(out) if self.remote is not None and out is not None else None
        self.prepared: dict[int, Any] = {}

    def run(self) -> None:
        """Every chunk through every step."""
        with self._logged():
            if isinstance(self.plan.model, Oracle):  # so that what is left of a budget is known
                for position in range(len(self.plan.stages)):
                    self._prepare(position)
            for number in range(self.plan.chunks):
                self._chunk(number)
        self.progress(1.0, "done")

    @contextmanager
    def _logged(self) -> Iterator[None]:
        """While open, what is sent to a model elsewhere is noted in the run's folder."""
        if self.remote is None:
            yield
            return
        before, self.remote.log = self.remote.log, self.log
        try:
            yield
        finally:
            self.remote.log = before

    @contextmanager
    def _group(self, key: str) -> Iterator[Record]:
        """One group of the journal: yields a record that holds, at the end, what the model was asked for."""
        record: Record = {"key": key}
        with counted(self.plan.model) as cost:
            if self.remote is None:
                yield record
            else:
                with self.remote.group(key, self.journal.groups) as spent:
                    yield record
        if self.remote is not None:
            cost.queries, repeated = spent
            record |= {"repeated": repeated} if repeated else {}
        record["cost"] = cost.to_dict()

    def _commit(self, commit: Record, records: list[Record], kept: tuple[Tensor, Tensor]) -> None:
        """Makes a group permanent; what was asked for it need not be known any more."""
        self.journal.commit(commit, records, *kept)
        if self.log is not None:
            self.log.drop()

    def _chunk(self, number: int) -> None:
        groups = self.journal.groups
        first, *keys = self.plan.keys(number)
        beside = self.plan.beside(number)
        if all(key in groups for key in (first, *keys, *beside)):
            return
        chunk = self._read(number, groups.get(first))
        if first not in groups:
            self._clean(first, chunk)
        alive = torch.tensor([record["correct"] for record in groups[first]])
        for position, key in enumerate([*keys, *beside]):
            if key not in groups:
                self.tell(number, min(position, len(keys) - 1), 0.0)
                if key in beside:
                    self._beside(key, beside[key], chunk, alive)
                else:
                    self._stage(key, position, chunk, alive)
            for record in groups[key]:
                alive[record["i"] - chunk.rows.start] = False

    def _read(self, number: int, known: list[Record] | None) -> _Chunk:
        """A chunk's samples, which must be those of its clean pass if that is done."""
        plan, rows = self.plan, self.plan.rows(number)
        x, y = plan.source.batch(rows)
        check_samples(x, y, plan.model.bounds, plan.model.known_classes)
        for k, record in enumerate(known or []):
            if record["x"] != sample_digest(x[k], int(y[k])):
                raise RunError(f"sample {rows[k]} is not the one of the run to resume; give the same data")
        return _Chunk(number, rows, x, y)

    def _clean(self, key: str, chunk: _Chunk) -> None:
        rows, x, y = chunk.rows, chunk.x, chunk.y
        with self._group(key) as group:
            decision = outcome(self.plan.model, x, y, torch.tensor(rows), self.plan.seed)
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
        told = {"attack": "clean", "eps": 0.0, "attempted": len(rows), "broken": 0, "notes": {}}
        self._commit({**group, **told}, records, _nothing())

    def _stage(self, key: str, position: int, chunk: _Chunk, alive: Tensor) -> None:
        """Runs one attack on the chunk's survivors and commits what it broke."""
        threat, stage = self.steps[position]
        live = alive.nonzero()[:, 0]
        x, y, index = chunk.x[live], chunk.y[live], torch.tensor(chunk.rows)[live]
        records: list[Record] = []
        kept, notes = _nothing(), {}
        if len(live):
            self._prepare(position)  # a group of its own
        with self._group(key) as group:
            result = self._attack(position, chunk, x, y, index) if len(live) else None
            if result is not None:
                notes = result.notes
                records, kept = self._confirm(stage, threat, x, y, index, result)
            elif len(live):
                notes = {"budget_spent": 1.0}
        if result is not None and isinstance(self.plan.model, Classifier):
            group["cost"]["queries"] = result.cost.queries
        told = {"attack": stage.attack, "eps": float(threat.eps), "attempted": len(live)}
        self._commit({**group, **told, "broken": len(records), "notes": notes}, records, kept)

    def _beside(self, key: str, kind: str, chunk: _Chunk, alive: Tensor) -> None:
        """Commits which correct samples an attack breaks that does not know of the defence, with new evidence only."""
        plan, threat = self.plan, self.plan.threats[-1]
        assert isinstance(plan.model, Defended)
        clean = self.journal.groups[plan.keys(chunk.number)[0]]
        right = torch.tensor([k for k, record in enumerate(clean) if record["correct"]], dtype=torch.long)
        x, y, index = chunk.x[right], chunk.y[right], torch.tensor(chunk.rows)[right]
        records: list[Record] = []
        kept = _nothing()
        with self._group(key) as group:
            if len(right):
                found = run_unaware(
                    kind, plan.model, threat, x, y, seed=plan.seed, index=index, precision=plan.precision
                )
                every = replace(found, success=torch.ones(len(right), dtype=torch.bool))
                records, (rows, points) = self._confirm(Stage(KINDS[kind]), threat, x, y, index, every)
                new = alive[rows - chunk.rows.start]
                kept = rows[new], points[new]
        fresh = set(kept[0].tolist())
        records = [{**(r if r["i"] in fresh else {"i": r["i"]}), "non_adaptive": kind} for r in records]
        told = {"attack": KINDS[kind], "eps": float(threat.eps), "attempted": len(right), "notes": {}}
        self._commit({**group, **told, "broken": len(records)}, records, kept)

    def _attack(self, position: int, chunk: _Chunk, x: Tensor, y: Tensor, index: Tensor) -> Any:
        """The attack's result on at least one sample; None where an oracle's budget leaves no query for it."""
        model, seed = self.plan.model, self.plan.seed
        attack = self._prepare(position)
        hook = _Hook(self, chunk.number, position)
        if not isinstance(model, Oracle) or model.budget is None:
            precision = self.plan.precision
            return attack.run(model, x, y, seed=seed, index=index, precision=precision, progress=hook)
        kept = len(x) + 2 * (
            len(self.plan.source) - chunk.rows.stop
        )  # to confirm these, and for those to come
        share = self._share(model, position, chunk, len(x), kept)
        if share <= len(x):  # an attack first asks for the clean points
            return None
        try:
            with model.limit(share, kept):
                return attack.run(model, x, y, seed=seed, index=index, progress=hook)
        except BudgetExceeded:  # what had to be sent again left too little even for the clean points
            return None

    def _prepare(self, position: int) -> Any:
        """A step's attack with what it learns once a run, whichever process learnt it; charged in its own group."""
        plan, number = self.plan, position % len(self.plan.stages)
        threat, stage = self.steps[position]
        attack = plan.attack(threat, stage)
        if number not in self.prepared:
            known = self._learned(number, position, attack)
            self.prepared[number] = attack.prepare(plan.model, plan.source, seed=plan.seed, known=known)
        return replace(self.prepared[number], threat=threat)

    def _learned(self, number: int, position: int, attack: Any) -> dict[str, Tensor] | None:
        """What a stage's attack has learnt, in this process or an earlier one; None if it learns nothing."""
        plan, key, known = self.plan, f"prepare/{number}", self.journal.known(number)
        if key in self.journal.groups and known is None:
            raise RunError(
                f"what {self.steps[position][1].attack} has learnt is missing; choose another folder"
            )
        if attack.preparation() and key not in self.journal.groups:
            self.tell(0, position, 0.0)
            if known is None:
                with self._group(key) as group:
                    ready = attack.prepare(plan.model, plan.source, seed=plan.seed)
                cost = Cost(**group["cost"])
                if isinstance(plan.model, Classifier):
                    cost.queries = attack.preparation()
                known = self.journal.keep(number, ready.learned(), cost)
            told = {"key": key, "attack": PREPARED, "eps": 0.0, "attempted": 0, "broken": 0, "notes": {}}
            self._commit({**told, "cost": known[1].to_dict()}, [], _nothing())
        return None if known is None else known[0]

    def _share(self, oracle: Oracle, position: int, chunk: _Chunk, live: int, kept: int) -> int:
        """The queries that a step may take: an equal part for every sample of what is not kept for later.

        What was sent twice changes no share, so that a resumed run decides like an unbroken one, while the budget
        still has room for that.
        """
        assert oracle.budget is not None
        spare = oracle.budget - oracle.asked - kept
        later = (len(self.plan.source) - chunk.rows.stop) * len(self.steps)
        share = int(spare * live / (live * (len(self.steps) - position) + later))
        return min(share, int(oracle.left) - kept)

    def _confirm(
        self, stage: Stage, threat: Threat, x: Tensor, y: Tensor, index: Tensor, result: Any
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
                "eps": float(threat.eps),
                "distance": float(distance[k]),
                "prediction": int(decision.prediction[k]),
                "confidence": round(float(decision.confidence[k]), 6),
                "marginal": not bool(decision.sure[k]),
            }
            for k in holds.nonzero()[:, 0].tolist()
        ]
        return records, (index[holds], points[holds])

    def tell(self, number: int, position: int, fraction: float) -> None:
        """Progress: so far into a step of a chunk."""
        plan = self.plan
        inside = (sum(self.weights[:position]) + self.weights[position] * fraction) / max(
            sum(self.weights), 1e-12
        )
        attack = self.steps[position][1].attack
        text = f"{attack}, samples to {plan.rows(number).stop} of {len(plan.source)}"
        self.progress(min((number + inside) / plan.chunks, 1.0), text)


@dataclass(frozen=True)
class _Hook:
    """Passes an attack's own progress on as a part of the run's."""

    run: _Run
    number: int
    position: int

    def __call__(self, fraction: float) -> None:
        self.run.tell(self.number, self.position, fraction)


def _nothing() -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.long), torch.zeros(0)
