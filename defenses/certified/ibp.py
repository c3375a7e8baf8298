"""Interval bound propagation: each value's interval, carried forward layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from robust.defenses.certified.bounds import Bounds, concretise, differences
from robust.defenses.certified.graph import INPUT, Step
from robust.defenses.certified.relaxation import through_affine

Box = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class IBP(Bounds):
    """Interval bound propagation (Gowal et al. 2018, arXiv:1810.12715), in linf.

    The affine layers at the end are merged with the margin (their section 3, "elision"), so that the bounds of a
    linear network are exact. They are loose on networks that were not trained for them.
    """

    name: ClassVar[str] = "ibp"
    norms: ClassVar[tuple[str, ...]] = ("linf",)

    def logits(self, lower: Tensor, upper: Tensor, classes: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """See `Bounds.logits`."""
        return interval_margins(self.steps, intervals(self.steps, lower, upper), classes)


def intervals(steps: list[Step], lower: Tensor, upper: Tensor) -> dict[str, Box]:
    """The interval of every step's value for inputs in a box."""
    found = {INPUT: (lower, upper)}
    for step in steps[1:]:
        found[step.name] = forward(step, [found[name] for name in step.inputs])
    return found


def forward(step: Step, boxes: list[Box]) -> Box:
    """A step's interval from its inputs' intervals."""
    if step.kind == "sum":
        return boxes[0][0] + boxes[1][0], boxes[0][1] + boxes[1][1]
    lower, upper = boxes[0]
    assert step.call is not None
    if step.kind != "affine":  # relu and maxpool do not decrease
        return step.call(lower), step.call(upper)
    assert step.magnitude is not None
    centre, radius = step.call((lower + upper) / 2), step.magnitude((upper - lower) / 2)
    return centre - radius, centre + radius


def interval_margins(steps: list[Step], boxes: dict[str, Box], classes: Tensor) -> Tensor:
    """(N, K) lower bounds of the margins, through the affine steps at the end and from the interval before them."""
    count = boxes[steps[-1].name][0].shape[1]
    a, name = differences(classes, count), steps[-1].name
    constant = a.new_zeros(a.shape[:2])
    by_name = {step.name: step for step in steps}
    while (step := by_name[name]).kind == "affine":
        a, shift = through_affine(step, a, boxes[step.inputs[0]][0].shape[1:])
        constant, name = constant + shift, step.inputs[0]
    return concretise(a, *boxes[name]) + constant
