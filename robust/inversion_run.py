"""An inversion run: what an observer sees of training steps, what attacks make of it, and how good that is.

The run's folder grows part by part, and a killed run goes on: ``recovered/`` has what each attack made of each step, or
of each class. At the end ``inversion.json`` has the table, every sample and the objectives' curves, ``report.html`` the
same with pictures, and ``digests.json`` their hashes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.claim import claiming
from robust.classifier import Classifier
from robust.conditions import conditions
from robust.detection import Progress, Samples
from robust.errors import ConfigError
from robust.inversion import Protocol, Watched
from robust.inversion_scores import Guess, best_guess, compared, still_falling, summary, thinned
from robust.part_store import PartStore, part_of, planned
from robust.rng import derive

SCHEMA = 1
RECORD, PAGE = "inversion.json", "report.html"
_FALLS = 0.1  # of the objective in the last tenth of the steps: more steps may find more


@dataclass(frozen=True)
class Question:
    """What a run asks.

    Attributes:
        clf: the model, with the weights at which gradients are taken.
        samples: the private ones, taken in batches in their order.
        held_out: others, from which a guess is made that needs no gradient; attacks may begin with it.
        attacks: by the names that the table gives them, as `robust.attacks.privacy` has them.
        protocol: how the gradients come about.
        known: whether the attacker knows the labels. seed: keys noise and attacks.
    """

    clf: Classifier
    samples: Samples
    held_out: Samples
    attacks: Mapping[str, Any]
    protocol: Protocol = field(default_factory=Protocol)
    known: bool = False
    seed: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)

    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to continue the other."""
        return {
            "schema": SCHEMA,
            "model": {"name": self.clf.name, "digest": self.clf.digest()},
            "data": {"n": len(self.samples.x), "digest": self.samples.digest()},
            "held_out": {"n": len(self.held_out.x), "digest": self.held_out.digest()},
            "protocol": self.protocol.config(),
            "known_labels": self.known,
            "seed": self.seed,
        }


@claiming
def run_inversion(
    question: Question,
    *,
    out: Path | None = None,
    resume: bool = False,
    command: Sequence[str] = (),
    progress: Progress = lambda done, text: None,
) -> dict[str, Any]:
    """Observes, recovers and measures; returns what ``inversion.json`` holds.

    Args:
        out: the run's folder; None keeps nothing. resume: go on with the one that is there; attacks may have been added
            since.

    Raises:
        RunError: a folder that cannot be written or is about something else.
        RobustError: a model or settings that an attack cannot do with.
    """
    _check(question)
    plan = planned(question.attacks)
    guess = best_guess(question.held_out.x, question.clf.bounds)
    store = PartStore(out, question.identity(), resume, plan, ("recovered",))
    begun, rows, pictures = time.perf_counter(), [], {}
    for number, (name, attack) in enumerate(question.attacks.items()):
        place = part_of("recovered", plan[name])

        def tell(done: float, number: int = number, name: str = name) -> None:
            progress((number + done) / len(question.attacks), name)

        measure = _classes if attack.sees == "confidences" else _steps
        row, pictures[name] = measure(question, attack, guess, store, place, tell)
        rows.append({"name": name, **plan[name], "sees": attack.sees, **row})
    found = {
        **question.identity(),
        **question.about,
        "guess": {"name": guess.name},
        "attacks": rows,
        "seconds": store.seconds(time.perf_counter() - begun),
        **conditions(question.clf.device),
        "command": list(command),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": _doubts(question, rows),
    }
    if out is not None:
        from robust.inversion_report import page

        text = page(found, guess.image, pictures, question.clf.bounds)
        store.finish(RECORD, found, {PAGE: text.encode()})
    return found


Pictures = list[tuple[Tensor, Tensor, dict[str, Any]]]
"""True image, recovered image, and the sample's numbers."""


def _steps(
    question: Question, attack: Any, guess: Guess, store: PartStore, place: str, tell: Any
) -> tuple[dict[str, Any], Pictures]:
    """One attack on the gradients of all batches."""
    clf, size = question.clf, question.protocol.batch
    watched, seed = Watched(clf), derive(question.seed, "inversion")
    samples: list[dict[str, Any]] = []
    pictures, parts = Pictures(), []
    batches = len(question.samples.x) // size
    for index in range(batches):
        tell(index / batches)
        rows = slice(index * size, (index + 1) * size)
        x, y = question.samples.x[rows], question.samples.y[rows]

        def recover(x: Tensor = x, y: Tensor = y, index: int = index) -> dict[str, Tensor]:
            def observe() -> list[Tensor]:
                return question.protocol.observe(watched, x, y, seed=seed, index=index)

            begun = time.perf_counter()
            found = attack(
                clf, observe, shape=tuple(x.shape[1:]), protocol=question.protocol, prior=guess.image, seed=seed,
                labels=y if question.known else None, index=index,
            )  # fmt: skip
            return _kept(found, time.perf_counter() - begun)

        part = store.tensors(f"{place}-{index:05d}", recover)
        told, order = compared(part["x"], x.cpu(), guess, clf.bounds)
        labels = part["y"][order] if size == 1 else _nearest_labels(part["y"], y)
        for k, numbers in enumerate(told):
            samples.append({**numbers, "label": int(y[k]), "told": int(labels[k])})
            pictures.append((x[k].cpu(), part["x"][order[k]], samples[-1]))
        parts.append(part)
    return {**summary(samples), **_effort(parts), "samples": samples}, pictures


def _classes(
    question: Question, attack: Any, guess: Guess, store: PartStore, place: str, tell: Any
) -> tuple[dict[str, Any], Pictures]:
    """One attack on the classes: what it makes of each, beside the mean of the class's images."""
    x = torch.cat([question.samples.x, question.held_out.x]).cpu()
    y = torch.cat([question.samples.y, question.held_out.y]).cpu()
    classes = y.unique()
    true = torch.stack([x[y == k].double().mean(0) for k in classes]).float()
    tell(0.0)

    def recover() -> dict[str, Tensor]:
        begun, seed = time.perf_counter(), derive(question.seed, "inversion")
        found = attack(question.clf, classes, shape=tuple(x.shape[1:]), prior=guess.image, seed=seed)
        return _kept(found, time.perf_counter() - begun)

    part = store.tensors(place, recover)
    samples, pictures = [], Pictures()
    for k, label in enumerate(classes.tolist()):
        told, _ = compared(part["x"][k : k + 1], true[k : k + 1], guess, question.clf.bounds)
        samples.append({**told[0], "label": label, "told": label})
        pictures.append((true[k], part["x"][k], samples[-1]))
    confidence = question.clf.logits(part["x"].to(question.clf.device)).softmax(1).cpu()
    sure = confidence.gather(1, classes[:, None].long())[:, 0]
    extra = {"confidence": float(sure.median()), "labels_right": None}
    return {**summary(samples), **extra, **_effort([part]), "samples": samples}, pictures


def _kept(found: Any, seconds: float) -> dict[str, Tensor]:
    """What of a recovery is written down."""
    numbers = [found.objective, float(found.evaluations), float(found.stopped), seconds]
    return {
        "x": found.x.contiguous(),
        "y": found.y,
        "track": found.track.contiguous(),
        "numbers": torch.tensor(numbers, dtype=torch.float64),
    }


def _effort(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Any]:
    """What an attack took, and how its objective fell (on the step whose own is the median)."""
    numbers = torch.stack([part["numbers"] for part in parts])
    middle = int(numbers[:, 0].argsort()[(len(numbers) - 1) // 2])
    objective = float(numbers[middle, 0])
    falling = [still_falling(part["track"]) for part in parts if not bool(part["numbers"][2])]
    return {
        "objective": objective if math.isfinite(objective) else None,  # every start ended in NaN
        "evaluations": int(numbers[:, 1].sum()),
        "attack_seconds": float(numbers[:, 3].sum()),
        "falling": sorted(falling)[len(falling) // 2] if falling else 0.0,
        "curve": thinned(parts[middle]["track"]),
    }


def _nearest_labels(told: Tensor, true: Tensor) -> Tensor:
    """Labels of a batch are told as a multiset: each true one that is among them counts as told."""
    left = told.tolist()
    found = []
    for label in true.tolist():
        found.append(label if label in left else -2)
        if label in left:
            left.remove(label)
    rest = iter(left)
    return torch.tensor([next(rest) if label == -2 else label for label in found])


def _check(question: Question) -> None:
    """What cannot be measured ends a run before it begins."""
    if not question.attacks:
        raise ConfigError("no attack is named; choose one such as inverting-gradients")
    n, size = len(question.samples.x), question.protocol.batch
    if n < 1 or n % size:
        raise ConfigError(f"{n} samples make no whole batches of {size}; give --n as a multiple of --batch")


def _doubts(question: Question, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What could make the numbers wrong, one line each."""
    found = []
    if question.about.get("untrained"):
        found.append(
            "the model is untrained; the gradients of a trained one are smaller and tell otherwise, mostly less"
        )
    if question.known:
        found.append("the attacker was given the labels")
    if question.protocol.batch > 1:
        found.append("images of a batch were matched with the truth's help; labels are told as a set")
    for row in rows:
        if row["sees"] == "gradient" and row["falling"] > _FALLS:
            found.append(
                f"{row['name']}: the objective still fell by {100 * row['falling']:.0f} % in the last tenth of its "
                "steps; more steps may recover more, so that this is no proof of safety"
            )
        if row["sees"] == "gradient" and row.get("restarts") == 1 and row["gain"] < 1:
            found.append(
                f"{row['name']} found nothing with one start; try restarts=4 and more steps before anything is "
                "called safe"
            )
    return [*found, *question.clf.warnings]
