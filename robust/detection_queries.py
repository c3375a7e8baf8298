"""A stateful detector measured: black-box attacks on watched accounts, plain and blinded, beside a clean user."""

from __future__ import annotations

import math
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from robust.detection_store import Store
from robust.detector import Fitted
from robust.errors import RobustError
from robust.oracle import Oracle
from robust.registry import room
from robust.report import clopper_pearson
from robust.roc import roc

if TYPE_CHECKING:
    from robust.detection import Question

ATTACKS = ("square", "nes", "hopskipjump")
_RATES = (0.01, 0.05)


def measure_queries(question: Question, fitted: Fitted, store: Store, name: str) -> dict[str, Any]:
    """What the accounts of attackers and of a clean user show.

    Every attacker has an account of its own and attacks one sample. A detection forgets the account's history, as if
    the attacker went on with a new one. The clean user asks about every test sample once.
    """
    right = _right(question)[: question.accounts]
    clean = store.tensors(f"scores/{name}--clean", lambda: _clean(question, fitted))
    usual = clean["scores"][clean["scores"].isfinite()]
    flags, asked = int(clean["detections"][0]), len(clean["scores"])
    measured = {}
    for attack in ATTACKS:
        for blind in (False, True):
            label = f"{attack}, blinded" if blind else attack
            kept = f"scores/{name}--{attack}{'-blinded' if blind else ''}"
            part = store.tensors(kept, partial(_accounts, question, fitted, right, attack, blind))
            measured[label] = _told(part, usual)
    share = {"count": flags, "of": asked, "fraction": flags / asked if asked else 0.0}
    return {
        "clean_flagged": {**share, "interval": list(clopper_pearson(flags, asked))},
        "attacks": measured,
        "verdict": _verdict(measured),
    }


def _right(question: Question) -> list[int]:
    clf, test = question.clf, question.test
    predicted = torch.cat([clf.logits(part).argmax(1).cpu() for part in test.x.split(64)])
    rows: list[int] = (predicted == test.y.cpu()).nonzero()[:, 0].tolist()
    return rows


def _clean(question: Question, fitted: Fitted) -> dict[str, Tensor]:
    guard = fitted.detector.guard(fitted)
    for part in question.test.x.split(64):
        guard(part)
    return {
        "scores": torch.tensor(guard.scores),
        "detections": torch.tensor([len(guard.detections)]),
    }


def _accounts(
    question: Question, fitted: Fitted, rows: list[int], attack: str, blind: bool
) -> dict[str, Tensor]:
    """One attack on one sample an account: first detection (0 for none), detections, queries, success; all scores."""
    kind, numbers, scores = room("attacks").load(attack), [], []
    if question.threat.norm not in kind.norms:
        raise RobustError(f"{attack} has no {question.threat.norm} form; accounts are attacked in linf or l2")
    clf, test = question.clf, question.test
    for row in rows:
        guard = fitted.detector.guard(fitted)
        whom = fitted.detector.blinded(guard, clf.bounds, question.seed + row) if blind else guard
        oracle = Oracle(
            whom,
            bounds=clf.bounds,
            classes=clf.classes,
            answers="labels" if kind.knowledge == "decision" else "scores",
        )
        result = kind(threat=question.threat, queries=question.queries, until="broken").run(
            oracle,
            test.x[row : row + 1],
            test.y[row : row + 1],
            seed=question.seed,
            index=torch.tensor([row]),
        )
        wrong = clf.logits(result.x_adv).argmax(1).cpu() != test.y[row : row + 1].cpu()
        first = guard.detections[0] if guard.detections else 0
        numbers.append([first, len(guard.detections), guard.asked, int(wrong)])
        scores += [score for score in guard.scores if math.isfinite(score)]
    return {"numbers": torch.tensor(numbers, dtype=torch.int64), "scores": torch.tensor(scores)}


def _told(part: dict[str, Tensor], usual: Tensor) -> dict[str, Any]:
    first, detections, asked, wrong = (part["numbers"][:, k].tolist() for k in range(4))
    found = [number for number in first if number]
    successes, n = sum(wrong), len(wrong)
    unseen = sum(bool(w) and not f for w, f in zip(wrong, first, strict=True))
    seen: dict[str, Any] = {
        "n": n,
        "broken": successes,
        "detected": {"count": len(found), "of": n, "fraction": len(found) / n if n else 0.0},
        "success": {
            "count": unseen, "of": n, "fraction": unseen / n if n else 0.0,
            "interval": list(clopper_pearson(unseen, n)),
        },
        "first_detection": median(found) if found else None,
        "mean_detections": sum(detections) / n if n else 0.0,
        "mean_queries": sum(asked) / n if n else 0.0,
    }  # fmt: skip
    if len(part["scores"]) and len(usual):
        curve = roc(usual.numpy(), part["scores"].numpy())
        seen |= {"auc": curve.auc, "tpr": {f"{rate:g}": curve.tpr_at(rate) for rate in _RATES}}
        seen["curve"] = curve.thinned()
    return seen


def _verdict(measured: dict[str, dict[str, Any]]) -> str:
    """By the best of the attacks, blinded or not, as `robust.detection.verdict` has it."""
    best = max(told["success"]["fraction"] for told in measured.values())
    return "falls" if best >= 0.5 else "leans" if best >= 0.1 else "stands"
