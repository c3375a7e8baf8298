"""The end of a run: merge the evidence, state the doubts, and seal the folder."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save

from robust.classifier import Classifier
from robust.cost import Cost
from robust.digest import data_digest, file_digest, write_atomic, write_json
from robust.doubts import raise_doubts
from robust.journal import SAMPLES, Journal, Record
from robust.oracle import Oracle
from robust.verdict import Samples, Verdict

if TYPE_CHECKING:
    from robust.evaluate import Plan

SCHEMA = 1


def finish(plan: Plan, journal: Journal, environment: dict[str, Any], report: bool) -> Verdict:
    """The verdict of a journal that holds every group; with a run folder, its final files."""
    from robust.evaluate import samples_of

    samples = samples_of(journal)
    index, adversarial = journal.evidence()
    order = index.argsort()
    index, adversarial = index[order], adversarial[order]
    manifest = _manifest(plan, journal, samples, environment)
    verdict = Verdict(samples, index, adversarial, manifest, journal.out)
    manifest["warnings"] = verdict.warnings = _doubts(plan, journal, verdict)
    manifest["results"] = {
        "clean_accuracy": verdict.clean_accuracy,
        "robust_accuracy": verdict.robust_accuracy,
        "curve": [list(pair) for pair in verdict.curve],
        "correct": int(verdict.correct.sum()),
        "robust": int(verdict.robust.sum()),
        "marginal": int(verdict.marginal.sum()),
    }
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
        from robust.report import write_report

        write_report(verdict, plan.source, verdict.labels, plan.model, out / "report.html")
        names.append("report.html")
    write_json(out / "digests.json", {name: file_digest(out / name) for name in names})
    journal.clear()


def _manifest(plan: Plan, journal: Journal, samples: Samples, environment: dict[str, Any]) -> dict[str, Any]:
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
        "data": {
            "name": getattr(source, "name", "tensors"),
            "n": len(source),
            "shape": list(x.shape[1:]),
            "classes": list(getattr(source, "classes", ())),
            "digest": data_digest(samples.digest),
        },
        "threat": {"norm": plan.threats[0].norm, "eps": plan.radii},
        "suite": {"name": plan.suite, "stages": describe["stages"]},
        "seed": plan.seed,
        "plan": describe,
        "stages": stage_table(journal.commits),
        "cost": _total(journal.commits).to_dict(),
        "started": plan.started,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        **environment,
        "warnings": [],
    }


def _classes(model: Classifier | Oracle, samples: Samples) -> int:
    if isinstance(model, Classifier):
        return model.classes
    return max(*samples.y, *samples.prediction) + 1 if model._classes is None else model.classes


def stage_table(commits: Sequence[Record]) -> list[dict[str, Any]]:
    """One row per radius and attack: attempted, broken, cost, summed over the chunks."""
    rows: dict[tuple[str, float], dict[str, Any]] = {}
    for commit in commits:
        row = rows.setdefault(
            (commit["attack"], commit["eps"]),
            {"attack": commit["attack"], "eps": commit["eps"], "attempted": 0, "broken": 0, "cost": Cost()},
        )
        row["attempted"] += commit["attempted"]
        row["broken"] += commit["broken"]
        row["cost"] += Cost(**commit["cost"])
    return [{**row, "cost": row["cost"].to_dict()} for row in rows.values()]


def _total(commits: Sequence[Record]) -> Cost:
    return sum((Cost(**commit["cost"]) for commit in commits), Cost())


def _doubts(plan: Plan, journal: Journal, verdict: Verdict) -> list[str]:
    from robust.evaluate import facts

    model = plan.model
    own = list(model.warnings) if isinstance(model, Classifier) else []
    bounds = model.bounds
    found = raise_doubts(
        n=len(verdict),
        correct=int(verdict.correct.sum()),
        robust=int(verdict.robust.sum()),
        classes=verdict.manifest["model"]["classes"],
        marginal=int(verdict.marginal.sum()),
        width=bounds[1] - bounds[0],
        norm=verdict.threat.norm,
        eps=float(torch.as_tensor(verdict.threat.eps)),
        randomised=isinstance(model, Classifier) and model.randomised,
        suite=plan.suite,
        stages=facts(plan, journal.commits),
    )
    if isinstance(model, Oracle):
        found.insert(0, "only the oracle's answers were used: a white-box attack may find a lower robust accuracy")
    return [*own, *found]
