"""The end of a run: merge the evidence, state the doubts, and seal the folder."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from safetensors.torch import save

from robust.adaptive import averages
from robust.classifier import Classifier
from robust.defense import describe as describe_defenses
from robust.digest import data_digest, file_digest, write_atomic, write_json
from robust.doubts import StageFacts, raise_doubts
from robust.errors import RunError
from robust.journal import SAMPLES, Journal, stage_table, sweep, total_cost
from robust.oracle import Backend, Oracle
from robust.plan import Plan, environment
from robust.registry import room
from robust.verdict import Samples, Verdict

SCHEMA = 1


def finish(plan: Plan, journal: Journal, report: bool) -> Verdict:
    """The verdict of a journal that holds every group; with a run folder, its final files."""
    samples = Samples.of(journal.groups)
    if len(samples.y) != len(plan.source):
        raise RunError(f"the journal holds {len(samples.y)} of {len(plan.source)} samples")
    manifest = _manifest(plan, journal, samples)
    verdict = Verdict(samples, *journal.evidence(), manifest, journal.out)
    manifest["warnings"] = verdict.warnings = _doubts(plan, journal, verdict)
    manifest["results"] = verdict.results()
    if journal.out is not None:
        _seal(plan, journal, verdict, report)
    return verdict


def _seal(plan: Plan, journal: Journal, verdict: Verdict, report: bool) -> None:
    """Writes the final files, the digests last, and only then removes the working ones."""
    out = journal.out
    assert out is not None
    tensors = {"index": verdict.adversarial_index, "adversarial": verdict.adversarial.contiguous()}
    write_atomic(out / "adversarial.safetensors", save(tensors))
    write_json(out / "manifest.json", verdict.manifest)
    names = ["manifest.json", SAMPLES, "adversarial.safetensors"]
    if report:
        from robust.report import write_report  # brings jinja2

        write_report(verdict, plan.source, verdict.labels, plan.model, out / "report.html")
        names.append("report.html")
    write_json(out / "digests.json", {name: file_digest(out / name) for name in names})
    sweep(out)


def _manifest(plan: Plan, journal: Journal, samples: Samples) -> dict[str, Any]:
    model, source = plan.model, plan.source
    x, _ = source.batch([0])
    describe = plan.describe()
    return {
        "schema": SCHEMA,
        "model": {
            "name": model.name,
            "digest": describe["model"],
            "classes": _classes(model, samples),
            "bounds": list(model.bounds),
            "mean": model.mean.flatten().tolist() if isinstance(model, Classifier) else None,
            "std": model.std.flatten().tolist() if isinstance(model, Classifier) else None,
            "randomised": isinstance(model, Classifier) and model.randomised,
            "oracle": isinstance(model, Oracle),
        },
        "defenses": describe_defenses(model),
        "data": {
            "name": getattr(source, "name", "tensors"),
            "n": len(source),
            "shape": list(x.shape[1:]),
            "classes": list(getattr(source, "classes", ())),
            "digest": data_digest(samples.digest),
        },
        "surrogates": [{"name": clf.name, "digest": clf.digest()} for clf in plan.surrogates],
        "threat": {"norm": plan.threats[0].norm, "eps": plan.radii},
        "suite": {"name": plan.suite, "stages": describe["stages"]},
        **_oracle(model, journal),
        "seed": plan.seed,
        "plan": describe,
        "stages": stage_table(journal.commits),
        "cost": total_cost(journal.commits).to_dict(),
        "started": journal.started,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment(plan),
        "warnings": [],
    }


def _oracle(model: Classifier | Oracle, journal: Journal) -> dict[str, Any]:
    """How an oracle was asked: kind of answers, budget, batch, what its backend says, and queries sent again."""
    if not isinstance(model, Oracle):
        return {}
    asked = {"answers": model.answers, "budget": model.budget, "batch": model.batch}
    told = model.backend.describe() if isinstance(model.backend, Backend) else {}
    return {"oracle": {**asked, **told, "repeated": journal.repeated()}}


def _classes(model: Classifier | Oracle, samples: Samples) -> int:
    return model.known_classes or max(*samples.y, *samples.prediction) + 1


def _facts(plan: Plan, journal: Journal) -> list[StageFacts]:
    """What each attack of the suite saw, summed over chunks and radii."""
    kinds = {stage.attack: room("attacks").load(stage.attack) for stage in plan.stages}
    found = {name: StageFacts(name, kind.knowledge) for name, kind in kinds.items()}
    for commit in journal.commits:
        if commit["attack"] in found:
            fact = found[commit["attack"]]
            fact.attempted += commit["attempted"]
            fact.broken += commit["broken"]
            for name, count in commit["notes"].items():
                fact.notes[name] = fact.notes.get(name, 0.0) + count
    return list(found.values())


def _doubts(plan: Plan, journal: Journal, verdict: Verdict) -> list[str]:
    model = plan.model
    found = raise_doubts(
        n=len(verdict),
        correct=int(verdict.correct.sum()),
        robust=int(verdict.robust.sum()),
        classes=verdict.manifest["model"]["classes"],
        undefined=int((verdict.clean_predictions < 0).sum()),
        marginal=int(verdict.marginal.sum()),
        width=model.bounds[1] - model.bounds[0],
        norm=verdict.threat.norm,
        eps=float(verdict.threat.eps),
        randomised=isinstance(model, Classifier) and model.randomised,
        averaged=any(averages(stage) for stage in plan.stages),
        suite=plan.suite,
        stages=_facts(plan, journal),
        unaware=sum((by or "").startswith("non-adaptive") for by in verdict.broken_by),
    )
    if isinstance(model, Oracle):
        again = journal.repeated()
        line = f"{again} queries were sent again, since their answers were lost on the way; they count twice"
        return [
            "only the oracle's answers were used: a white-box attack may find a lower robust accuracy",
            *([line] if again else []),
            *found,
        ]
    return [*model.warnings, *found]
