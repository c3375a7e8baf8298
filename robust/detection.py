"""A detection run: what detectors make of adversarial points, and what an attacker makes of detectors.

The run's folder grows part by part, and a killed run goes on: ``points/`` has each attack's points, a hundred samples a
file, shared by all detectors (those of the attack that knows the detector are its own), ``detectors/`` what each one
learnt, ``scores/`` each one's scores of clean and adversarial points. At the end ``detection.json`` has the table and
the curves, ``roc.svg`` the curves drawn, ``digests.json`` their hashes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.claim import claiming
from robust.classifier import Classifier
from robust.conditions import conditions
from robust.detection_queries import measure_queries
from robust.detection_store import Store
from robust.detector import Detector, Fitted, require_held_out
from robust.digest import data_digest, sample_digest
from robust.errors import RobustError
from robust.registry import room
from robust.report import clopper_pearson
from robust.roc import roc
from robust.threat import L2, Threat

SCHEMA = 1
RECORD, FIGURE = "detection.json", "roc.svg"
AWARE = "detector-aware"
RATES = (0.01, 0.05)  # of false positives, in the table
_CHUNK = 100  # samples of a file of points
_FALLS, _LEANS = 0.5, 0.1  # success of the attack that knows it

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Samples:
    """Labelled images in memory: (N, C, H, W) in the model's box and (N,)."""

    x: Tensor
    y: Tensor

    def digest(self) -> str:
        """sha256 (hex) over the samples in order."""
        return data_digest([sample_digest(x, int(y)) for x, y in zip(self.x, self.y, strict=True)])


@dataclass(frozen=True)
class Question:
    """What a run asks.

    Attributes:
        clf: the model that is watched.
        test: samples that are attacked; held_out: clean ones that set thresholds; learn: what detectors learn from.
        detectors: by the names that the table gives them. attacks: likewise, each with its settings.
        threat: of the attacks with a budget; those that look for the smallest perturbation have none.
        fpr: the false-positive rate; None for each detector's usual one. seed: keys everything.
        accounts, queries: of the attacks on a stateful detector: how many samples, and queries for each.
    """

    clf: Classifier
    test: Samples
    held_out: Samples
    learn: Samples
    detectors: Mapping[str, Detector]
    attacks: Mapping[str, Mapping[str, Any]]
    threat: Threat
    fpr: float | None = None
    seed: int = 0
    accounts: int = 20
    queries: int = 500
    about: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to continue the other."""
        parts = {"test": self.test, "held_out": self.held_out, "learn": self.learn}
        return {
            "schema": SCHEMA,
            "model": {"name": self.clf.name, "digest": self.clf.digest()},
            "data": {name: {"n": len(part.x), "digest": part.digest()} for name, part in parts.items()},
            "threat": self.threat.describe(),
            "fpr": self.fpr,
            "seed": self.seed,
            "accounts": self.accounts,
            "queries": self.queries,
        }


@claiming
def run_detection(
    question: Question,
    *,
    out: Path | None = None,
    resume: bool = False,
    command: Sequence[str] = (),
    progress: Progress = lambda done, text: None,
) -> dict[str, Any]:
    """Measures every detector on every attack, and returns what ``detection.json`` holds.

    Args:
        out: the run's folder; None keeps nothing. resume: go on with the one that is there; detectors and attacks may
            have been added since.

    Raises:
        RunError: a folder that cannot be written or is about something else.
        RobustError: too few samples for the false-positive rate, or a detector that cannot learn from this model.
    """
    _check(question)
    store, begun = Store(out, question.identity(), resume, question.attacks), time.perf_counter()
    rows, done = [], 0
    total = sum(1 + len(_attacks_of(question, detector)) for detector in question.detectors.values())
    for name, detector in question.detectors.items():
        progress(done / total, f"{name} learns")
        fitted = _fitted(question, store, name, detector)
        if detector.stateful:
            rows.append(_row(name, fitted, measure_queries(question, fitted, store, name)))
            done += 1 + len(_attacks_of(question, detector))
            continue
        clean = _clean(question, store, name, fitted)
        measured, done = {}, done + 1
        for attack in question.attacks:
            progress(done / total, f"{name} meets {attack}")
            measured[attack] = _cell(question, store, name, fitted, attack, clean)
            done += 1
        flagged = int((clean > fitted.threshold).sum())
        told = {
            "clean_flagged": _share(flagged, len(clean)),
            "attacks": measured,
            "verdict": verdict(measured),
        }
        rows.append(_row(name, fitted, told))
    found = {
        **question.identity(),
        **question.about,
        "clean_accuracy": float(_right(question).float().mean()),
        "attacks": {name: dict(settings) for name, settings in question.attacks.items()},
        "detectors": rows,
        "seconds": store.seconds(time.perf_counter() - begun),
        **conditions(question.clf.device),
        "command": list(command),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": list(question.clf.warnings),
    }
    if out is not None:
        from robust.detection_figure import figure

        store.finish(RECORD, found, {FIGURE: figure(found)})
    return found


def _check(question: Question) -> None:
    """What cannot be measured ends a run before it begins."""
    for name in question.attacks:
        build(name, question)
    for name, detector in question.detectors.items():
        fpr = detector.usual_fpr if question.fpr is None else question.fpr
        try:
            require_held_out(len(question.held_out.x), fpr)
        except RobustError as error:
            raise RobustError(f"{name}: {error}") from None


def build(name: str, question: Question, detector: Fitted | None = None) -> Any:
    """An attack of the run; one that looks for the smallest perturbation is not limited, in its own norm.

    Raises:
        RobustError: an attack that does not fit, in one line.
    """
    kind, settings = room("attacks").load(name), dict(question.attacks[name])
    if kind.knowledge != "white":
        raise RobustError(
            f"{name} asks queries, which only a stateful detector watches; choose a white-box attack"
        )
    threat = question.threat
    if kind.minimum_norm:
        norm = threat.norm if threat.norm in kind.norms else kind.norms[0]
        threat = type(threat)() if norm == threat.norm else _unbounded(norm)
    elif threat.norm not in kind.norms:
        raise RobustError(f"{name} has no {threat.norm} form; it knows {', '.join(kind.norms)}")
    return kind(threat=threat, **settings, **({"detector": detector} if name == AWARE else {}))


def verdict(measured: Mapping[str, Mapping[str, Any]]) -> str:
    """What the attack that knows the detector shows, in one word: it falls, leans, stands, or nobody tried."""
    if AWARE not in measured:
        return "untried"
    success = measured[AWARE]["success"]["fraction"]
    return "falls" if success >= _FALLS else "leans" if success >= _LEANS else "stands"


def _unbounded(norm: str) -> Threat:
    from robust.threat import THREATS

    return THREATS[norm]()


def _attacks_of(question: Question, detector: Detector) -> list[str]:
    return [] if detector.stateful else list(question.attacks)


def _row(name: str, fitted: Fitted, told: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "detector": fitted.describe(),
        "attacked_by": fitted.detector.attacked_by(),
        **told,
    }


def _fitted(question: Question, store: Store, name: str, detector: Detector) -> Fitted:
    kept = store.detector(name, question.clf)
    if kept is not None and kept.detector == detector:
        return kept
    learn, begun = question.learn, time.perf_counter()
    fitted = detector.fit(question.clf, learn.x, learn.y, seed=question.seed)
    fitted = fitted.calibrated(question.held_out.x, question.fpr)
    store.keep_detector(name, fitted, time.perf_counter() - begun)
    return fitted


def _clean(question: Question, store: Store, name: str, fitted: Fitted) -> Tensor:
    """(N,) scores of the clean samples."""
    return store.tensors(f"scores/{name}--clean", lambda: {"scores": _scores(fitted, question.test.x)})[
        "scores"
    ]


def _scores(fitted: Fitted, x: Tensor) -> Tensor:
    with torch.no_grad():
        return fitted.score(x).cpu()


def _right(question: Question) -> Tensor:
    """(N,) bool: clean samples that the model classifies rightly: only those are worth an attack."""
    clf, test = question.clf, question.test
    predicted = torch.cat([clf.logits(part).argmax(1).cpu() for part in test.x.split(64)])
    return predicted == test.y.cpu()


def _points(question: Question, store: Store, attack: str, name: str, fitted: Fitted) -> dict[str, Tensor]:
    """Of every sample the attack's point, whether its class is wrong, and whether the attack claims success."""
    own = f"{name}--{attack}" if attack == AWARE else attack
    parts = []
    for start in range(0, len(question.test.x), _CHUNK):
        rows = slice(start, start + _CHUNK)

        def run(rows: slice = rows) -> dict[str, Tensor]:
            x, y = question.test.x[rows], question.test.y[rows]
            index = torch.arange(len(question.test.x))[rows]
            result = build(attack, question, fitted).run(
                question.clf, x, y, seed=question.seed, index=index, precision="float32"
            )
            said = torch.cat([question.clf.logits(part).argmax(1).cpu() for part in result.x_adv.split(64)])
            return {"x_adv": result.x_adv.cpu(), "wrong": said != y.cpu(), "success": result.success.cpu()}

        parts.append(store.tensors(f"points/{own}-{start:05d}", run))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _cell(
    question: Question, store: Store, name: str, fitted: Fitted, attack: str, clean: Tensor
) -> dict[str, Any]:
    """One detector against one attack, over the samples that were right before."""
    points, right = _points(question, store, attack, name, fitted), _right(question)
    scores = store.tensors(
        f"scores/{name}--{attack}", lambda: {"scores": _scores(fitted, points["x_adv"].to(fitted.clf.device))}
    )["scores"]
    broken = points["wrong"] & right
    unseen = broken & (scores <= fitted.threshold)
    found: dict[str, Any] = {
        "n": int(right.sum()),
        "broken": int(broken.sum()),
        "success": _share(int(unseen.sum()), int(right.sum())),
        "flagged": _share(int((broken & ~unseen).sum()), int(broken.sum())),
    }
    distance = L2().distance(points["x_adv"][broken], question.test.x.cpu()[broken])
    found["median_l2"] = float(distance.median()) if len(distance) else None
    if not bool(broken.any()):
        return {**found, "auc": None, "interval": None, "tpr": None, "curve": []}
    curve = roc(clean.numpy(), scores[broken].numpy())
    found |= {"auc": curve.auc, "interval": list(curve.interval)}
    found["tpr"] = {f"{rate:g}": curve.tpr_at(rate) for rate in RATES}
    return {**found, "curve": curve.thinned()}


def _share(count: int, total: int) -> dict[str, Any]:
    """A fraction with its 95 % Clopper-Pearson interval."""
    fraction = count / total if total else 0.0
    return {
        "count": count,
        "of": total,
        "fraction": fraction,
        "interval": list(clopper_pearson(count, total)),
    }
