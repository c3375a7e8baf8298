"""How a defended model is evaluated: attacked as it declares, beside what attacks that do not know of it would claim.

Two attacks that do not know of the defence stand beside the suite. Both are PGD with 20 steps at the largest radius, on
every sample that the defended model classifies correctly:

- "replay": points made against the undefended classifier, as strong as PGD makes them, sent through the defence;
- "naive": PGD on the defended model with autograd's own gradient, one draw each, where the defence declares that this
  is not enough (`bpda` or `randomised`).

A sample that only these break is broken all the same, with its example as evidence.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, cast

from torch import Tensor

from robust.classifier import Classifier
from robust.defense import Defended
from robust.oracle import Oracle
from robust.registry import room
from robust.suites import Stage
from robust.threat import Threat

EOT = 20  # draws that a gradient is averaged over, as the suite `rand` does
ATTACK, STEPS = "pgd", 20
KINDS = {"replay": "non-adaptive-replay", "naive": "non-adaptive-naive"}  # and the names in a run's groups


def adapted(suite: str, planned: Sequence[Stage], model: Classifier | Oracle) -> list[Stage]:
    """A suite's stages as the model's defences declare that they must be attacked; the same for other models.

    Gradients of a randomised defence are averaged over `EOT` draws wherever an attack can do so. The suite `full` gains
    the attack of Athalye et al. 2018 (arXiv:1802.00420): long PGD, averaged, through the substitute's gradient.
    """
    found = list(planned)
    if not isinstance(model, Defended):
        return found
    if model.randomised:
        found = [_averaged(stage) for stage in found]
    if suite == "full" and model.randomised:
        found.append(Stage("eot-pgd", {"steps": 100, "copies": EOT}))
    elif suite == "full" and model.bpda:
        found.append(Stage("pgd", {"steps": 100, "restarts": 2}))
    return found


def averages(stage: Stage) -> bool:
    """Whether a stage averages its gradients over draws."""
    return bool(stage.params.get("copies", _copies(stage) or 1) > 1)


def _averaged(stage: Stage) -> Stage:
    if _copies(stage) is None or averages(stage):
        return stage
    return Stage(stage.attack, {**stage.params, "copies": EOT})


def _copies(stage: Stage) -> int | None:
    """How many draws a gradient attack averages over by default; None if it cannot."""
    kind = room("attacks").load(stage.attack)
    known = {item.name: item.default for item in fields(kind)} if kind.knowledge == "white" else {}
    return cast("int | None", known.get("copies"))


def kinds(model: object) -> list[str]:
    """Which attacks that do not know of the defence are measured beside the suite; none without a defence."""
    if not isinstance(model, Defended):
        return []
    return ["replay", "naive"] if model.bpda or model.randomised else ["replay"]


def declared_kinds(defenses: Sequence[dict[str, Any]]) -> list[str]:
    """`kinds` by the declarations in a manifest."""
    naive = any(item["bpda"] or item["randomised"] for item in defenses)
    return (["replay", "naive"] if naive else ["replay"]) if defenses else []


def run_unaware(
    kind: str,
    model: Defended,
    threat: Threat,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    index: Tensor,
    precision: str,
) -> Any:
    """What an attack of `KINDS` makes of the samples: the attack's result, whose success is not the defended model's.

    Args:
        x: (N, C, H, W); y: (N,); index: (N,) identities; precision: see `robust.evaluate`.
    """
    replay = kind == "replay"
    until = "strongest" if replay else "broken"
    attack = room("attacks").load(ATTACK)(threat=threat, until=until, steps=STEPS)
    with nullcontext() if replay else model.unaware():
        victim = model.undefended if replay else model
        return attack.run(victim, x, y, seed=seed, index=index, precision=precision if replay else "original")
