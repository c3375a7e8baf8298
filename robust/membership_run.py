"""A membership run: reference models, their answers and the target's, every attack's scores, and how good they are.

The run's folder grows part by part, and a killed run goes on: ``models/`` has every model that was trained (and a
checkpoint of those in training), ``answers/`` what each model said of the samples, ``scores/`` each attack's. At the
end ``membership.json`` has the table and the curves, ``roc.svg`` the curves drawn, ``report.html`` both, and
``digests.json`` their hashes.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.augment import Augment
from robust.claim import claiming
from robust.classifier import Classifier
from robust.conditions import conditions
from robust.detection import Samples
from robust.digest import model_digest
from robust.errors import ConfigError, DataError
from robust.membership import Evidence, References, halves
from robust.membership_scores import measure
from robust.optimise import make_settings
from robust.oracle import Oracle
from robust.part_store import PartStore, part_of, planned
from robust.recipe import described
from robust.rng import derive
from robust.stacked import Progress, Stacked, first_states, fit_stacked, require_supported

SCHEMA = 1
RECORD, FIGURE, PAGE = "membership.json", "roc.svg", "report.html"
_NOTED = 5.0  # seconds of training between two entries into the run's clock
_TRAINING = 0.9  # of a run's progress, where it trains models
WALK: Mapping[str, Any] = {"epochs": 30, "batch_size": 64, "lr": 2e-3}


@dataclass(frozen=True)
class Question:
    """What a run asks.

    Attributes:
        samples: those whose membership is to be told.
        target: the model in question; None: one that the run trains itself, on a random half of the samples.
        members: (N,) bool, which samples a given target was trained on; None where the run trains it.
        attacks: by the names that the table gives them, as `robust.attacks.privacy` has them.
        build: makes an untrained model like the target from torch's global generator, where models are trained.
        shadows: reference models to train, each on a random half of the samples (an even number).
        walk: how models are trained, the fields of `robust.optimise.Settings`; augment: likewise.
        population: further samples that no model was trained on.
        seed: keys halves, first weights, training and attacks.
    """

    samples: Samples
    attacks: Mapping[str, Any]
    target: Classifier | Oracle | None = None
    members: Tensor | None = None
    build: Callable[[], Classifier] | None = None
    shadows: int = 0
    walk: Mapping[str, Any] = field(default_factory=lambda: WALK)
    augment: Augment | None = None
    population: Samples | None = None
    seed: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)

    def member_mask(self) -> Tensor:
        """(N,) bool: the truth."""
        if self.members is not None:
            return self.members.cpu()
        return halves(len(self.samples.x), 1, derive(self.seed, "membership/target"))[0]

    def identity(self) -> dict[str, Any]:
        """What two runs must share for one to continue the other."""
        mask = self.member_mask()
        return {
            "schema": SCHEMA,
            "target": None if self.target is None else model_digest(self.target),
            "data": {"n": len(mask), "digest": self.samples.digest()},
            "members": hashlib.sha256(mask.numpy().tobytes()).hexdigest(),
            "population": None if self.population is None else self.population.digest(),
            "shadows": self.shadows,
            "walk": {
                key: list(value) if isinstance(value, tuple) else value for key, value in self.walk.items()
            },
            "augment": described(self.augment),
            "seed": self.seed,
        }


@claiming
def run_membership(
    question: Question,
    *,
    out: Path | None = None,
    resume: bool = False,
    command: Sequence[str] = (),
    progress: Progress = lambda done, text: None,
) -> dict[str, Any]:
    """Trains what is to be trained, asks, scores and measures; returns what ``membership.json`` holds.

    Args:
        out: the run's folder; None keeps nothing. resume: go on with the one that is there; attacks may have been added
            since.

    Raises:
        RunError: a folder that cannot be written or is about something else.
        RobustError: attacks that need more than there is.
    """
    _check(question)
    plan = planned(question.attacks)
    store = PartStore(out, question.identity(), resume, plan, ("answers", "scores"))
    begun = time.perf_counter()
    models = _train(question, store, progress)
    evidence = _evidence(question, store, models)
    members, rows = question.member_mask(), []
    for number, (name, attack) in enumerate(question.attacks.items()):
        start = _TRAINING if models is not None else 0.0
        progress(start + (1 - start) * number / len(question.attacks), name)
        part = part_of("scores", plan[name])
        scores = store.tensors(part, lambda attack=attack: {"scores": attack.run(evidence)})["scores"]  # type: ignore[misc]
        rows.append({"name": name, **plan[name], "sees": attack.sees, **measure(scores, members)})
    found = {
        **question.identity(),
        **question.about,
        "target": _told_target(question, evidence),
        "samples": {"n": len(members), "members": int(members.sum()), "others": int((~members).sum())},
        "accuracy": _accuracy(evidence.labels(), evidence.y, members),
        "references": _told_references(question, evidence, models),
        "attacks": rows,
        "seconds": store.seconds(time.perf_counter() - begun),
        **conditions(evidence.target.device),
        "command": list(command),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "warnings": _doubts(question, evidence, members),
    }
    if out is not None:
        from robust.membership_figure import figure
        from robust.membership_report import page

        store.finish(RECORD, found, {FIGURE: figure(found), PAGE: page(found).encode()})
    return found


def _check(question: Question) -> None:
    """What cannot be measured ends a run before it begins."""
    if not question.attacks:
        raise ConfigError("no attack is named; choose one such as lira-online")
    if (question.target is None) != (question.members is None):
        raise DataError(
            "a given target needs members, the samples that it was trained on; without one leave out both"
        )
    mask = question.member_mask()
    if len(mask) != len(question.samples.x) or not 0 < int(mask.sum()) < len(mask):
        raise DataError(
            f"{int(mask.sum())} of {len(question.samples.x)} samples are members; attacks are measured on both kinds"
        )
    if question.shadows < 0 or question.shadows % 2:
        raise ConfigError(
            f"{question.shadows} reference models make no pairs; give an even number such as 16"
        )
    require_supported(make_settings(question.walk))
    if question.build is None and (question.shadows or question.target is None):
        raise ConfigError("models are to be trained, and nothing says how one is built")
    for name, attack in question.attacks.items():
        if attack.needs() > question.shadows:
            raise ConfigError(
                f"{name} needs {attack.needs()} reference models or more, and there are {question.shadows}; "
                f"give --shadow {max(attack.needs() + attack.needs() % 2, 2)} or more"
            )
    labels_only = isinstance(question.target, Oracle) and question.target.answers == "labels"
    for name, attack in question.attacks.items():
        if labels_only and attack.sees == "scores":
            raise ConfigError(f"{name} needs scores, and the target gives labels; use a label-only attack")


def _train(question: Question, store: PartStore, progress: Progress) -> Stacked | None:
    """The target, where the run trains it, and the reference models; None where there is nothing to train."""
    own = question.target is None
    masks = halves(len(question.samples.x), question.shadows, derive(question.seed, "membership/references"))
    if own:
        masks = torch.cat([question.member_mask()[None], masks])
    if not len(masks):
        return None
    assert question.build is not None
    with torch.random.fork_rng(devices=[]):
        template = question.build()
    x, y = question.samples.x, question.samples.y
    keys = list(range(0 if own else 1, question.shadows + 1))
    clock = time.perf_counter()

    def tell(done: float, text: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        if now - clock >= _NOTED:
            store.note(now - clock)
            clock = now
        progress(_TRAINING * done, text)

    seed = derive(question.seed, "membership/training")
    models = fit_stacked(
        template, (x.cpu(), y.cpu()), [mask.nonzero()[:, 0] for mask in masks], keys=keys, augment=question.augment,
        first=first_states(question.build, seed), out=None if store.out is None else store.out / "models", resume=True,
        progress=tell, **{**question.walk, "seed": seed},
    )  # fmt: skip
    store.note(time.perf_counter() - clock)
    return models


def _evidence(question: Question, store: PartStore, models: Stacked | None) -> Evidence:
    target, first = question.target, 0
    if target is None:
        assert models is not None
        target, first = models.classifier(0), 1
        target.name = models.template.name
    references = None
    if models is not None and question.shadows:
        inside = halves(
            len(question.samples.x), question.shadows, derive(question.seed, "membership/references")
        )
        references = References(_Models(models, first), inside)
    population = None if question.population is None else (question.population.x, question.population.y)
    return Evidence(
        target, question.samples.x, question.samples.y, references, population,
        seed=derive(question.seed, "membership/attacks"), keep=store.tensors,
    )  # fmt: skip


class _Models(Sequence[Classifier]):
    """Trained models from number `first` on, each built when it is asked for."""

    def __init__(self, models: Stacked, first: int) -> None:
        self.models, self.first = models, first

    def __len__(self) -> int:
        return len(self.models) - self.first

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.models.classifier(self.first + number)


def _accuracy(labels: Tensor, y: Tensor, members: Tensor) -> dict[str, float]:
    right = labels == y
    return {
        "members": float(right[members].double().mean()),
        "others": float(right[~members].double().mean()),
    }


def _told_target(question: Question, evidence: Evidence) -> dict[str, Any]:
    return {
        "name": evidence.target.name,
        "digest": model_digest(evidence.target),
        "trained_here": question.target is None,
        "sees": "labels"
        if isinstance(evidence.target, Oracle) and evidence.target.answers == "labels"
        else "scores",
    }


def _told_references(question: Question, evidence: Evidence, models: Stacked | None) -> dict[str, Any]:
    """How many there are, how they were trained, and how well they learnt."""
    if models is None:
        return {"count": 0}
    told: dict[str, Any] = {
        "count": question.shadows,
        "training_seconds": models.seconds,
        "engine": models.engine,
    }
    if any(attack.needs() for attack in question.attacks.values()):
        seen = [
            _accuracy(evidence.reference_logits(k).argmax(1), evidence.y, evidence.inside[k])
            for k in range(question.shadows)
        ]
        told["accuracy"] = {
            kind: sum(one[kind] for one in seen) / max(len(seen), 1) for kind in ("members", "others")
        }
    return told


def _doubts(question: Question, evidence: Evidence, members: Tensor) -> list[str]:
    """What could make the numbers wrong, one line each."""
    others = int((~members).sum())
    found = []
    if others < 1000:
        found.append(
            f"0.1 % of {others} others is less than one sample: that rate means no false positive at all; "
            "more samples (--n) would tell more"
        )
    if question.target is not None and question.shadows:
        found.append(
            "the reference models were trained here, perhaps otherwise than the target was; an attacker who knows its "
            "training better would leak more"
        )
    if question.about.get("parts"):
        found.append(
            "members are of the training part and others of the test part; where the parts differ in kind, an attack "
            "may tell the parts and not the membership"
        )
    warned = evidence.target.warnings if isinstance(evidence.target, Classifier) else []
    return [*found, *warned]
