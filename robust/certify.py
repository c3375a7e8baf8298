"""A certification run: records a sample at a time into a folder, and what they add up to.

The folder holds ``samples.jsonl`` (counts and radii of every sample, flushed to disk a chunk at a time; a kill loses
the chunk under way and counts nothing twice), ``certificate.json`` (conditions, confidence, which model voted, the
curve), ``certificate.svg``, and ``digests.json``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from robust import __version__
from robust.certificate import Certificate, Record
from robust.claim import claiming
from robust.data import Data
from robust.digest import data_digest, file_digest, read_json, sample_digest, write_atomic, write_json
from robust.errors import RunError
from robust.journal import EVIDENCE, SAMPLES, Journal
from robust.report import clopper_pearson
from robust.verdict import Verdict

SCHEMA = 1
RECORD, FIGURE = "certificate.json", "certificate.svg"
CHUNK = {"cpu": 8, "cuda": 64}  # samples between two flushes


def certified_accuracy(records: Sequence[Record], radius: float) -> float:
    """The fraction of samples whose class is right and certified at `radius` and beyond; at 0, right at all."""
    return sum(held(record, radius) for record in records) / max(len(records), 1)


def held(record: Record, radius: float) -> bool:
    """Whether a sample's class is right and its radius reaches `radius`."""
    return bool(record["class"] == record["label"] and record["radius"] >= radius)


@claiming
def run_certificate(
    certificate: Certificate,
    data: Data,
    settings: Mapping[str, Any],
    radii: Sequence[float],
    *,
    out: Path | None = None,
    resume: bool = False,
    verdict: Verdict | None = None,
    command: Sequence[str] = (),
    progress: Callable[[float, str], None] = lambda done, text: None,
) -> dict[str, Any]:
    """Certifies the samples of `data`, and returns what ``certificate.json`` holds.

    Args:
        certificate: the method, with its classifier.
        data: samples in the classifier's box.
        settings: what `Certificate.records` takes.
        radii: of the table of certified accuracy.
        out: the run's folder; None keeps nothing. resume: go on with the one that is there.
        verdict: an evaluation of the same samples in the same norm, whose curve is drawn beside.

    Raises:
        RunError: a folder that cannot be written or is about something else, or a verdict that does not fit.
    """
    samples = [data[row] for row in range(len(data))]
    digests = [sample_digest(x, y) for x, y in samples]
    about = {
        "certificate": certificate.conditions(settings),
        "model": {"name": certificate.clf.name, "digest": certificate.clf.digest()},
        "data": {"name": data.name, "n": len(samples), "digest": data_digest(digests)},
    }
    beside = None if verdict is None else _beside(verdict, certificate.norm, digests)
    journal = Journal(out, {"schema": SCHEMA, **about}, resume)
    chunk = CHUNK.get(certificate.clf.device.type, 8)
    for start in range(0, len(samples), chunk):
        rows = range(start, min(start + chunk, len(samples)))
        progress(start / len(samples), f"{certificate.name}: sample {start} of {len(samples)}")
        if f"{start}" not in journal.groups:
            _commit(journal, certificate, samples, digests, settings, rows)
    records = [record for start in range(0, len(samples), chunk) for record in journal.groups[f"{start}"]]
    found = {
        "schema": SCHEMA,
        **about,
        **_summary(records, radii, certificate.norm),
        "seconds": sum(commit["seconds"] for commit in journal.commits),
        "device": str(certificate.clf.device),
        "versions": {"robust": __version__, "torch": torch.__version__},
        "command": list(command),
        "started": journal.started,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": list(certificate.clf.warnings),
    }
    if verdict is not None and beside is not None:
        found |= {"verdict": beside, **_contradictions(records, verdict, certificate)}
    if out is not None:
        _write(out, found, records)
    return found


def _commit(
    journal: Journal,
    certificate: Certificate,
    samples: Sequence[tuple[torch.Tensor, int]],
    digests: Sequence[str],
    settings: Mapping[str, Any],
    rows: range,
) -> None:
    """Certifies one chunk and makes it permanent."""
    began = time.perf_counter()
    x = torch.stack([samples[row][0] for row in rows])
    found = certificate.records(x, index=torch.tensor(rows), **settings)
    records = [
        {"index": row, "label": int(samples[row][1]), "digest": digests[row], **record}
        for row, record in zip(rows, found, strict=True)
    ]
    commit = {"key": f"{rows.start}", "seconds": time.perf_counter() - began}
    journal.commit(commit, records, torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def _summary(records: Sequence[Record], radii: Sequence[float], norm: str) -> dict[str, Any]:
    """The curve and its parts, from the records alone."""
    n = len(records)
    used = [record["n"] for record in records if "n" in record]
    return {
        "norm": norm,
        "n": n,
        "clean_accuracy": certified_accuracy(records, 0.0),
        "abstained": sum(record["class"] < 0 for record in records),
        "certified_accuracy": [
            {"radius": r, "accuracy": a, "interval": clopper_pearson(round(a * n), n)}
            for r in sorted({0.0, *radii})
            for a in [certified_accuracy(records, r)]
        ],
        "voters": sorted({record["voter"] for record in records}),
        **({"mean_votes": sum(used) / n} if used else {}),
    }


def _beside(verdict: Verdict, norm: str, digests: Sequence[str]) -> dict[str, Any]:
    """What a verdict on the same samples measured; anything else is one line."""
    threat = verdict.manifest["threat"]["norm"]
    if threat != norm:
        raise RunError(
            f"the verdict is about {threat}, the certificate about {norm}; they cannot be compared"
        )
    if list(verdict.samples.digest) != list(digests):
        raise RunError(
            "the verdict is about other samples; evaluate and certify the same data, as many of it"
        )
    return {
        "model": verdict.manifest["model"]["name"],
        "suite": verdict.suite,
        "curve": [[0.0, verdict.clean_accuracy], *([float(e), float(a)] for e, a in verdict.curve if e > 0)],
        "out": None if verdict.out is None else str(verdict.out),
    }


def _contradictions(records: Sequence[Record], verdict: Verdict, certificate: Certificate) -> dict[str, Any]:
    """Samples that are certified and yet broken within their radius, for a verdict on the very same model.

    A smoothing certificate is about the smoothed model, of which a verdict on the model behind it says nothing.
    """
    if certificate.name == "smoothing" or verdict.manifest["model"]["digest"] != certificate.clf.digest():
        return {}
    near = verdict.samples.distance
    return {"contradicted": [r["index"] for r in records if held(r, 0.0) and near[r["index"]] <= r["radius"]]}


def _write(out: Path, found: Mapping[str, Any], records: Sequence[Record]) -> None:
    from robust.certificate_figure import curve

    write_json(out / RECORD, found)
    write_atomic(out / FIGURE, curve(found, records))
    with suppress(OSError):
        (out / EVIDENCE).rmdir()
    files = (SAMPLES, RECORD, FIGURE)
    write_json(out / "digests.json", {name: file_digest(out / name) for name in files})


def load_certificate(out: Path) -> tuple[dict[str, Any], list[Record]]:
    """What a finished run's folder says: ``certificate.json``, and the records a sample each."""
    from robust.journal import read_pages

    if not (out / RECORD).exists():
        raise RunError(f"{out} holds no {RECORD}; the command that began it, with --resume, goes on")
    pages = read_pages((out / SAMPLES).read_bytes())
    records = [record for group in pages.groups.values() for record in group]
    return read_json(out / RECORD), sorted(records, key=lambda record: int(record["index"]))
