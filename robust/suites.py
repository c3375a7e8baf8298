"""Suites: which attacks, with which settings, make a verdict; literal, by name and norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from robust.errors import RobustError, ThreatError, UnknownName
from robust.registry import room, unknown

DESCRIPTIONS = {
    "quick": "APGD-CE and APGD-T, 20 steps, 3 targets: an upper bound of the robust accuracy in seconds",
    "standard": "AutoAttack as published: APGD-CE, APGD-T, FAB-T, Square (Croce & Hein 2020, arXiv:2003.01690)",
    "rand": "for randomised models: APGD-CE and APGD-DLR, gradients averaged over 20 forwards (arXiv:2003.01690)",
    "score": "Square with 5,000 queries: for models that give scores only",
    "decision": "two attacks on labels alone, 5,000 queries each: RayS, HopSkipJump, SurFree, GeoDA, Pointwise by norm",
    "transfer": "momentum and diverse-input attacks on given surrogates, or on a substitute from 2,000 queries",
    "full": "standard, transfer, decision: what gradients, scores, other models and labels alone can break",
}
NORMS = ("linf", "l2", "l1")
BLACK_BOX = ("score", "decision", "transfer")  # suites that an oracle can answer
# Decision-based searches by norm. In l1 none is published as a minimiser but GeoDA and Pointwise.
_DECISION = {"linf": ("rays", "hopskipjump"), "l2": ("hopskipjump", "surfree"), "l1": ("geoda", "pointwise")}
_TRANSFER = "mifgsm,difgsm,vmifgsm"  # what is crafted on surrogates, in every norm
_SUBSTITUTE = {"queries": 2000}  # how one is distilled where none is given


@dataclass(frozen=True)
class Stage:
    """One attack of a suite: its registry name and hyper-parameters."""

    attack: str
    params: Mapping[str, Any] = field(default_factory=dict)

    def passes(self) -> float:
        """Model passes that a sample costs which survives it, about: a gradient counts as three."""
        passes: float = room("attacks").load(self.attack).passes(**self.params)
        return passes


def stages(suite: str | Sequence[str], norm: str, black_box: bool = False) -> tuple[str, list[Stage]]:
    """The suite's name and its stages in order.

    Args:
        suite: a name of `DESCRIPTIONS`, an attack's name, a comma list or a sequence of attacks' names.
        norm: the threat's norm.
        black_box: whether the model is an Oracle, for which white-box suites are refused.
    """
    names = [part.strip() for part in suite.split(",")] if isinstance(suite, str) else list(suite)
    if len(names) == 1 and names[0] in DESCRIPTIONS:
        plan = _named(names[0], norm)
        if black_box and names[0] not in BLACK_BOX:
            raise RobustError(
                f"suite {names[0]} needs gradients, which an Oracle does not give; "
                "use suite score, decision or transfer"
            )
        return names[0], plan
    attacks = room("attacks")
    if not names:
        raise RobustError("the suite names no attack; give a suite's name or attacks' names")
    for name in names:
        if name not in attacks:
            known = dict.fromkeys([*DESCRIPTIONS, *attacks]) if len(names) == 1 else attacks
            raise UnknownName(unknown("suite or attack" if len(names) == 1 else "attack", name, list(known)))
    return ",".join(names), [Stage(name) for name in names]


def _named(name: str, norm: str) -> list[Stage]:
    if norm not in NORMS:
        raise ThreatError(
            f"suite {name} has no {norm} form; it knows {', '.join(NORMS)}; or name attacks, as pgd"
        )
    if name == "quick":
        return [Stage("apgd-ce", {"steps": 20}), Stage("apgd-t", {"steps": 20, "n_targets": 3})]
    if name == "rand":
        return [
            Stage("apgd-ce", {"steps": 100, "copies": 20}),
            Stage("apgd-dlr", {"steps": 100, "copies": 20}),
        ]
    square = Stage("square", {"queries": 5000})
    if name == "score":
        return [square]
    decision = [Stage(attack, {"queries": 5000}) for attack in _DECISION[norm]]
    if name == "decision":
        return decision
    transfer = [Stage("surrogate", {"inner": _TRANSFER, **_SUBSTITUTE})]
    if name == "transfer":
        return transfer
    sparse = norm == "l1"  # the published l1 form: Croce & Hein 2021, arXiv:2103.01208
    standard = [
        Stage("apgd-ce", {"steps": 100, "restarts": 5 if sparse else 1}),
        Stage("apgd-t", {"steps": 100, "n_targets": 5 if sparse else 9}),
        Stage("fab-t", {"steps": 100, "n_targets": 9}),
        square,
    ]
    # Points of other models come before searches by labels, as they cost a query each and not thousands.
    return [*standard, *transfer, *decision] if name == "full" else standard
