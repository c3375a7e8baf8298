"""Re-checking a stored verdict: files, numbers, data, model, and every adversarial example."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.decide import decide
from robust.digest import data_digest, file_digest, read_json, sample_digest
from robust.errors import RobustError, VerificationError
from robust.rows import Source, as_source

if TYPE_CHECKING:
    from robust.verdict import Verdict

_BATCH = 64


def verify(verdict: Verdict, clf: Classifier, x: Any, y: Tensor | None = None) -> dict[str, Any]:
    """Raises `VerificationError` on the first mismatch; rows within float noise are reported instead.

    Args:
        clf: the original model; x, y: the data, as given to `evaluate`.
    """
    if verdict.out is not None:
        check_files(verdict.out)
    _check_numbers(verdict)
    try:
        source = as_source(x, y)
    except RobustError as error:
        raise VerificationError(str(error)) from error
    if len(source) != len(verdict):
        raise VerificationError(f"the verdict is about {len(verdict)} samples, the data given has {len(source)}")
    if clf.digest() != verdict.manifest["model"]["digest"]:
        raise VerificationError("the model is not the one that was evaluated: weights, normalisation or box differ")
    clf.randomised = bool(verdict.manifest["model"]["randomised"])
    with clf.session():
        differing = [*_check_clean(verdict, clf, source), *_check_evidence(verdict, clf, source)]
    return {"samples": len(verdict), "examples": len(verdict.adversarial_index), "marginal_differences": differing}


def check_files(out: Path) -> None:
    """Every file of the folder against digests.json."""
    digests = read_json(out / "digests.json")
    for name in ("manifest.json", "samples.jsonl", "adversarial.safetensors"):
        if name not in digests:
            raise VerificationError(f"digests.json does not cover {name}")
    for name, digest in digests.items():
        path = out / name
        if not path.is_file():
            raise VerificationError(f"{name} is missing from {out}")
        if file_digest(path) != digest:
            raise VerificationError(f"{name} was altered: its sha256 differs from digests.json")


def _check_numbers(verdict: Verdict) -> None:
    """The manifest's claims against the samples'."""
    results = verdict.manifest["results"]
    for name, value in (("clean_accuracy", verdict.clean_accuracy), ("robust_accuracy", verdict.robust_accuracy)):
        if abs(results[name] - value) > 1e-12:
            raise VerificationError(f"the manifest claims {name}={results[name]}, the samples say {value}")
    if [list(pair) for pair in verdict.curve] != [list(pair) for pair in results["curve"]]:
        raise VerificationError("the manifest's curve is not the one that the samples give")
    if data_digest(verdict.samples.digest) != verdict.manifest["data"]["digest"]:
        raise VerificationError("samples.jsonl is not about the manifest's data")
    held = set(verdict.adversarial_index.tolist())
    for i, name in enumerate(verdict.broken_by):
        if (name is not None) != (i in held):
            raise VerificationError(f"sample {i} is {'broken without' if name else 'unbroken with'} an example")


def _check_clean(verdict: Verdict, clf: Classifier, source: Source) -> list[int]:
    differing: list[int] = []
    for start in range(0, len(source), _BATCH):
        rows = range(start, min(start + _BATCH, len(source)))
        x, y = source.batch(rows)
        for k, i in enumerate(rows):
            if sample_digest(x[k], int(y[k])) != verdict.samples.digest[i]:
                raise VerificationError(f"sample {i} of the data given is not the one that was evaluated")
        decision = decide(clf, x, y, index=torch.tensor(list(rows)), seed=verdict.seed)
        wrong = (~decision.hit).cpu() != verdict.correct[rows.start : rows.stop]
        for k in wrong.nonzero()[:, 0].tolist():
            if bool(decision.sure[k]) and not bool(verdict.marginal[rows[k]]):
                raise VerificationError(f"clean sample {rows[k]}: the verdict says correct={not bool(decision.hit[k])}")
            differing.append(rows[k])
    return differing


def _check_evidence(verdict: Verdict, clf: Classifier, source: Source) -> list[int]:
    differing: list[int] = []
    largest = float(torch.as_tensor(verdict.threat.eps))
    for start in range(0, len(verdict.adversarial_index), _BATCH):
        index = verdict.adversarial_index[start : start + _BATCH]
        points = verdict.adversarial[start : start + _BATCH]
        x, y = source.batch(index.tolist())
        if points.shape != x.shape:
            raise VerificationError(f"examples are {tuple(points.shape[1:])}, the data is {tuple(x.shape[1:])}")
        radii = verdict.eps_broken[index]
        inside = verdict.threat.with_eps(radii).inside(points, x, clf.bounds) & (radii <= largest)
        decision = decide(clf, points, y, index=index, seed=verdict.seed)
        predicted = verdict.adversarial_predictions[index]
        for k, i in enumerate(index.tolist()):
            if not bool(inside[k]):
                raise VerificationError(f"the example of sample {i} is outside its threat or the box")
            if bool(decision.hit[k]) and int(decision.prediction[k]) == int(predicted[k]):
                continue
            if bool(decision.sure[k]) and not bool(verdict.marginal[i]):
                said = int(decision.prediction[k])
                raise VerificationError(f"the example of sample {i} is predicted {said}, not {int(predicted[k])}")
            differing.append(i)
    return differing
