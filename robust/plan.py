"""The plan of a run: everything that fixes its outcome, checked before anything is written."""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from robust import __version__
from robust.adaptive import adapted, kinds
from robust.classifier import Classifier
from robust.decide import BATCH, DRAWS
from robust.defense import Defended
from robust.digest import data_digest, model_digest, sample_digest
from robust.errors import DataError, RobustError, ThreatError
from robust.oracle import Oracle
from robust.registry import room
from robust.rows import Source, check_samples, check_whole
from robust.suites import Stage, stages
from robust.threat import Threat, make_threat
from robust.twin import check_precision, describe_twins, fast_bfloat16

_CHUNK_ELEMENTS = 3 << 16
_FIRST = 16
_WORTH_A_TWIN = 20_000  # model passes


@dataclass(frozen=True)
class Plan:
    """Everything that fixes the outcome of a run; a resumed run must have the same.

    Attributes:
        threats: of one norm, the radii ascending.
        suite: the suite's name; stages: its attacks in order.
        chunk: samples per journal group.
        first: digest of the first samples, by which a resumed run knows its data.
        precision: what the attacks compute in: "original", "float32" or "bfloat16" (see `Attack.run`).
        surrogates: models that transfer attacks craft on, where they need not distil one.
        command: what the manifest names as the run's command.
    """

    model: Classifier | Oracle
    source: Source
    threats: list[Threat]
    suite: str
    stages: list[Stage]
    seed: int
    chunk: int
    first: str
    precision: str
    surrogates: tuple[Classifier, ...] = ()
    command: tuple[str, ...] = ()

    @property
    def radii(self) -> list[float]:
        """The radii in ascending order."""
        return [float(threat.eps) for threat in self.threats]

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return -(-len(self.source) // self.chunk)

    def rows(self, number: int) -> range:
        """The samples of a chunk."""
        return range(number * self.chunk, min((number + 1) * self.chunk, len(self.source)))

    def steps(self) -> list[tuple[Threat, Stage]]:
        """What a chunk goes through after its clean pass: every stage at every radius, the smallest first."""
        return [(threat, stage) for threat in self.threats for stage in self.stages]

    def attack(self, threat: Threat, stage: Stage) -> Any:
        """A stage's attack, as it breaks samples."""
        return _attack(threat, stage, self.surrogates)

    def keys(self, number: int) -> list[str]:
        """The journal keys of a chunk: its clean pass, then `steps`."""
        attacks = [f"{number}/{eps!r}/{k}" for eps in self.radii for k in range(len(self.stages))]
        return [f"{number}/clean", *attacks]

    def beside(self, number: int) -> dict[str, str]:
        """A defended model's further journal keys of a chunk, and the attacks of `robust.adaptive` that they hold."""
        return {f"{number}/{kind}": kind for kind in kinds(self.model)}

    def describe(self) -> dict[str, Any]:
        """What `--resume` compares."""
        asked = {"answers": self.model.answers} if isinstance(self.model, Oracle) else {}
        surrogates = [clf.digest() for clf in self.surrogates]
        transfers = any(_transfers(stage) for stage in self.stages)
        return {
            "model": model_digest(self.model),
            **asked,
            "data": self.first,
            "n": len(self.source),
            "norm": self.threats[0].norm,
            "eps": self.radii,
            "suite": self.suite,
            "stages": [{"attack": stage.attack, **stage.params} for stage in self.stages],
            "seed": self.seed,
            "chunk": self.chunk,
            **({"surrogates": surrogates} if transfers else {}),
        }


def _transfers(stage: Stage) -> bool:
    return bool(room("attacks").load(stage.attack).knowledge == "transfer")


def _attack(threat: Threat, stage: Stage, surrogates: Sequence[Classifier]) -> Any:
    given = {"models": tuple(surrogates)} if surrogates and _transfers(stage) else {}
    return room("attacks").load(stage.attack)(threat=threat, until="broken", **stage.params, **given)


def make_plan(
    model: Classifier | Oracle,
    source: Source,
    threat: Threat | Sequence[Threat],
    suite: str | Sequence[str],
    seed: int,
    chunk: int | None,
    precision: str = "auto",
    surrogates: Sequence[Classifier] = (),
    command: Sequence[str] | None = None,
) -> Plan:
    """The plan of a run on these inputs; see `robust.evaluate` for the arguments.

    Raises:
        RobustError: an input with which the run could not end.
    """
    if not isinstance(model, (Classifier, Oracle)):
        raise RobustError(
            f"evaluate takes a Classifier or an Oracle, not {type(model).__name__}; wrap the module"
        )
    if chunk is not None and chunk < 1:
        raise RobustError(f"chunk={chunk} holds no sample; give at least 1")
    threats = _ascending(threat)
    name, planned = stages(suite, threats[0].norm, isinstance(model, Oracle))
    planned = adapted(name, planned, model)
    x, y = source.batch(range(min(_FIRST, len(source))))
    if x.dim() != 4:
        raise DataError(
            f"samples have the shape {tuple(x.shape[1:])}; evaluate takes images (channels, height, width)"
        )
    check_samples(x, y, model.bounds)
    if isinstance(model, Classifier):
        model.check(x)
        if isinstance(model, Defended):  # before costs are booked
            model.undefended.check(x)
    elif model.answers == "labels" and model.known_classes is None:
        raise RobustError(
            "an oracle that gives labels does not say how many classes there are; pass classes="
        )
    check_whole(source, model.bounds, model.known_classes)
    if surrogates and not any(_transfers(stage) for stage in planned):
        raise RobustError(f"suite {name} uses no surrogates; they are for suite transfer or full")
    attacks = [_attack(item, stage, surrogates) for item in threats for stage in planned]
    if isinstance(model, Oracle):
        asked = sum(attack.preparation() for attack in attacks[: len(planned)])  # once for all radii
        _check_budget(model, len(source), asked)
    for attack in attacks:
        attack.validate(model, x, y, None)
    first = data_digest([sample_digest(point, int(label)) for point, label in zip(x, y, strict=True)])
    size = chunk or max(32, min(256, _CHUNK_ELEMENTS // max(x[0].numel(), 1)))
    passes = len(source) * len(threats) * sum(stage.passes() for stage in planned)
    resolved = _resolve(model, precision, passes)
    told = tuple(sys.argv if command is None else command)
    return Plan(model, source, threats, name, planned, seed, size, first, resolved, tuple(surrogates), told)


def _resolve(model: Classifier | Oracle, precision: str, passes: float) -> str:
    """What "auto" means for a run of so many model passes; it depends on the whole run, never on what is left of it."""
    check_precision(precision)
    if isinstance(model, Oracle) or model.randomised:
        return "original"
    if precision != "auto":
        return precision
    if passes < _WORTH_A_TWIN:
        return "original"
    return "bfloat16" if fast_bfloat16(model.device) else "float32"


def _check_budget(oracle: Oracle, n: int, asked: int) -> None:
    if oracle.left < 2 * n + asked:
        substitute = f", and {asked} teach a substitute first" if asked else ""
        raise RobustError(
            f"the query budget has {int(oracle.left)} left, but {n} samples need {2 * n} to be labelled and "
            f"confirmed{substitute}"
        )


def _ascending(threat: Threat | Sequence[Threat]) -> list[Threat]:
    threats = [threat] if isinstance(threat, Threat) else list(threat)
    if not threats or len({item.norm for item in threats}) != 1:
        raise ThreatError("give one threat, or several of one norm")
    for item in threats:
        if torch.as_tensor(item.eps).dim():
            raise ThreatError("a verdict has one eps for all samples; attacks take one per sample")
        if not item.bounded:
            raise ThreatError(f"a verdict needs a finite eps, such as {type(item).__name__}(0.5)")
        make_threat(item.norm, item.eps)  # a verdict stores its threat as norm and eps
    threats.sort(key=lambda item: float(item.eps))
    radii = [float(item.eps) for item in threats]
    if len(set(radii)) != len(radii):
        raise ThreatError(f"eps is given twice: {radii}")
    return threats


def environment(plan: Plan) -> dict[str, Any]:
    """Versions, device, batch shapes and command, for the manifest."""
    device = plan.model.device
    return {
        "versions": {
            "robust": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "device": {
            "type": device.type,
            "name": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else platform.processor() or "cpu",
            "threads": torch.get_num_threads(),
        },
        "precision": plan.precision,
        "twins": describe_twins(plan.model),
        "batches": {"chunk": plan.chunk, "decision": BATCH},
        "draws": DRAWS if isinstance(plan.model, Classifier) and plan.model.randomised else 1,
        "command": list(plan.command),
    }
