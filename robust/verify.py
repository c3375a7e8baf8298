"""Re-checking a stored verdict: files, numbers, data, model, and every adversarial example.

Nothing that the folder says of itself is trusted, its digests and its `marginal` flags included: what can be counted
is counted again, and an outcome that differs passes only where it is within float noise *here*.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust.adaptive import KINDS, declared_kinds
from robust.classifier import Classifier
from robust.decide import BATCH, Decision, outcome
from robust.defense import describe
from robust.digest import data_digest, file_digest, model_digest, read_json, sample_digest
from robust.errors import RobustError, VerificationError
from robust.journal import PREPARED, SAMPLES, read_pages, stage_table, total_cost
from robust.oracle import Oracle
from robust.rows import Source, as_source

if TYPE_CHECKING:
    from robust.verdict import Verdict

_COVERED = ("manifest.json", SAMPLES, "adversarial.safetensors")
_CONFIDENCE = 0.01  # what float noise in the logits may change in a stored probability


def verify(verdict: Verdict, model: Classifier | Oracle, x: Any, y: Tensor | None = None) -> dict[str, Any]:
    """Raises `VerificationError` on the first mismatch; rows within float noise are reported instead.

    Args:
        model: the original model; x, y: the data, as given to `evaluate`.
    """
    try:
        if verdict.out is not None:
            check_files(verdict.out)
            _check_pages(verdict, verdict.out / SAMPLES)
        _check_numbers(verdict)
        source = as_source(x, y)
        if len(source) != len(verdict):
            raise VerificationError(
                f"the verdict is about {len(verdict)} samples, the data given has {len(source)}"
            )
        if model_digest(model) != verdict.manifest["model"]["digest"]:
            raise VerificationError(
                "the model is not the one evaluated: weights, normalisation or box differ"
            )
        if describe(model) != verdict.manifest.get("defenses", []):
            raise VerificationError("the manifest does not declare the model's defences as they are")
        with _as_evaluated(model, verdict):
            differing = [*_check_clean(verdict, model, source), *_check_evidence(verdict, model, source)]
    except VerificationError:
        raise
    except (RobustError, LookupError, TypeError, ValueError) as error:  # a folder that makes no sense
        line = str(error) if isinstance(error, RobustError) else f"{type(error).__name__}: {error}"
        raise VerificationError(f"the verdict cannot be checked: {line}") from error
    examples = len(verdict.adversarial_index)
    return {"samples": len(verdict), "examples": examples, "marginal_differences": differing}


@contextmanager
def _as_evaluated(model: Classifier | Oracle, verdict: Verdict) -> Iterator[None]:
    """A classifier is judged by single forwards or by a majority, as the verdict says."""
    if not isinstance(model, Classifier):
        yield
        return
    before, model.randomised = model.randomised, bool(verdict.manifest["model"]["randomised"])
    try:
        with model.session():
            yield
    finally:
        model.randomised = before


def check_files(out: Path) -> None:
    """Every file of the folder against digests.json."""
    try:
        digests = read_json(out / "digests.json")
    except RobustError as error:
        raise VerificationError(str(error)) from error
    for name in _COVERED:
        if name not in digests:
            raise VerificationError(f"digests.json does not cover {name}")
    for name, digest in digests.items():
        path = out / name
        if not path.is_file():
            raise VerificationError(f"{name} is missing from {out}")
        if file_digest(path) != digest:
            raise VerificationError(f"{name} was altered: its sha256 differs from digests.json")


def _check_pages(verdict: Verdict, path: Path) -> None:
    """The manifest's account of the run against the groups of samples.jsonl."""
    pages, manifest = read_pages(path.read_bytes()), verdict.manifest
    for commit, records in zip(pages.commits, pages.groups.values(), strict=True):
        clean = commit["attack"] == "clean"
        if len(records) != commit["attempted" if clean else "broken"]:
            raise VerificationError(
                f"group {commit['key']} of {SAMPLES} does not hold what its last line says"
            )
        for record in records:
            beside = KINDS.get(record.get("non_adaptive", ""))
            if beside is not None and "broken_by" not in record:  # counted, but broken by another attack
                same = beside == commit["attack"]
            else:
                same = clean or (record["broken_by"], record["eps"]) == (commit["attack"], commit["eps"])
            if not same:
                raise VerificationError(f"sample {record['i']} stands in the group of another attack or eps")
    declared = {KINDS[kind] for kind in declared_kinds(manifest.get("defenses", []))}
    if declared != {commit["attack"] for commit in pages.commits} & set(KINDS.values()):
        raise VerificationError(f"{SAMPLES} does not hold the non-adaptive attacks that the defences ask for")
    apart = ("clean", PREPARED, *KINDS.values())
    attacks = [commit for commit in pages.commits if commit["attack"] not in apart]
    if manifest["threat"]["eps"] != sorted({commit["eps"] for commit in attacks}):
        raise VerificationError(f"the manifest's eps {manifest['threat']['eps']} are not those of {SAMPLES}")
    names = list(dict.fromkeys(commit["attack"] for commit in attacks))
    if list(dict.fromkeys(stage["attack"] for stage in manifest["suite"]["stages"])) != names:
        raise VerificationError(
            f"the manifest's suite is not the one of {SAMPLES}, which ran {', '.join(names)}"
        )
    if (
        stage_table(pages.commits) != manifest["stages"]
        or total_cost(pages.commits).to_dict() != manifest["cost"]
    ):
        raise VerificationError(f"the manifest's stages or cost are not those of {SAMPLES}")


def _check_numbers(verdict: Verdict) -> None:
    """The manifest's claims against the samples'."""
    claims = verdict.manifest["results"]
    for name, value in verdict.results().items():
        if claims[name] != value:
            raise VerificationError(f"the manifest claims {name}={claims[name]}, the samples say {value}")
    if data_digest(verdict.samples.digest) != verdict.manifest["data"]["digest"]:
        raise VerificationError(f"{SAMPLES} is not about the manifest's data")
    broken = [i for i, name in enumerate(verdict.broken_by) if name is not None]
    held = verdict.adversarial_index.tolist()
    if held != broken or len(verdict.adversarial) != len(held):
        odd = sorted({*held} ^ {*broken})
        raise VerificationError(
            f"the examples are not those of the broken samples; first at sample {[*odd, '?'][0]}"
        )


def _check_clean(verdict: Verdict, model: Classifier | Oracle, source: Source) -> list[int]:
    differing: list[int] = []
    told = _tells_confidence(verdict, model)
    for start in range(0, len(source), BATCH):
        rows = range(start, min(start + BATCH, len(source)))
        x, y = source.batch(rows)
        for k, i in enumerate(rows):
            if int(y[k]) != verdict.samples.y[i]:
                raise VerificationError(f"sample {i} has the label {int(y[k])}, not {verdict.samples.y[i]}")
            if sample_digest(x[k], int(y[k])) != verdict.samples.digest[i]:
                raise VerificationError(f"sample {i} of the data given is not the one that was evaluated")
        index = torch.tensor(rows)
        decision = outcome(model, x, y, index, verdict.seed)
        stored = (~verdict.correct[index], verdict.clean_predictions[index])
        confidence = verdict.samples.confidence if told else None
        differing += _compare("clean sample", decision, index, *stored, confidence)
    return differing


def _check_evidence(verdict: Verdict, model: Classifier | Oracle, source: Source) -> list[int]:
    differing: list[int] = []
    told = _tells_confidence(verdict, model)
    for start in range(0, len(verdict.adversarial_index), BATCH):
        index = verdict.adversarial_index[start : start + BATCH]
        points = verdict.adversarial[start : start + BATCH]
        x, y = source.batch(index.tolist())
        x = x.cpu()
        if points.shape != x.shape:
            raise VerificationError(
                f"examples are {tuple(points.shape[1:])}, the data is {tuple(x.shape[1:])}"
            )
        threat = verdict.threat.with_eps(verdict.eps_broken[index])
        inside = threat.inside(points, x, model.bounds)
        exact = (threat.distance(points, x) - verdict.distance[index]).abs() <= 1e-9
        for k, i in enumerate(index.tolist()):
            if not bool(inside[k]):
                raise VerificationError(f"the example of sample {i} is outside its threat or the box")
            if not bool(exact[k]):
                raise VerificationError(
                    f"the example of sample {i} is not at the distance {verdict.distance[i]}"
                )
        decision = outcome(model, points, y, index, verdict.seed)
        stored = (torch.ones(len(index), dtype=torch.bool), verdict.adversarial_predictions[index])
        confidence = verdict.samples.adversarial_confidence if told else None
        differing += _compare("the example of sample", decision, index, *stored, confidence)
    return differing


def _tells_confidence(verdict: Verdict, model: Classifier | Oracle) -> bool:
    """An oracle may give labels only: neither its verdict nor its answers hold confidences."""
    return isinstance(model, Classifier) and not verdict.manifest["model"]["oracle"]


def _compare(
    what: str,
    decision: Decision,
    index: Tensor,
    hit: Tensor,
    prediction: Tensor,
    confidence: list[float] | None,
) -> list[int]:
    """The samples whose stored outcome differs within float noise; anything beyond it raises."""
    other_hit = decision.hit.cpu() != hit
    other_class = decision.prediction.cpu() != prediction
    beyond = (other_hit & decision.sure.cpu()) | (other_class & decision.firm.cpu())
    for k, i in enumerate(index.tolist()):
        if bool(beyond[k]):
            said, stored = int(decision.prediction[k]), int(prediction[k])
            here = ("wrong" if bool(decision.hit[k]) else "right") if said == stored else f"predicted {said}"
            raise VerificationError(f"{what} {i} is {here}, which is not what the verdict says ({stored})")
        if confidence is None or bool(other_class[k]):
            continue
        sure = float(decision.confidence[k])
        if not abs(sure - confidence[i]) <= _CONFIDENCE:
            raise VerificationError(f"{what} {i} has the confidence {sure:.4f}, not {confidence[i]:.4f}")
    return index[other_hit | other_class].tolist()
