"""CROWN: the margin as a linear function below the true one, carried backward to the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robust.defenses.certified.bounds import Bounds, concretise, differences
from robust.defenses.certified.graph import INPUT, Step
from robust.defenses.certified.ibp import Box, forward, interval_margins
from robust.defenses.certified.relaxation import through_affine, through_maxpool, through_relu

_NUMBERS = 1 << 20  # coefficients at a time, which stay in a cache


@dataclass(frozen=True, eq=False)
class CROWN(Bounds):
    """Linear bounds of a ReLU network (CROWN, Zhang et al. 2018, arXiv:1811.00866), in linf, l2 and l1.

    Every value before a ReLU whose interval crosses zero is bounded by CROWN itself, and no bound is looser than
    interval propagation's. In l2 and l1 the box is not used, but for the intervals.
    """

    name: ClassVar[str] = "crown"
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l1")

    def logits(self, lower: Tensor, upper: Tensor, classes: Tensor, x: Tensor, eps: Tensor) -> Tensor:
        """See `Bounds.logits`."""
        boxes: dict[str, Box] = {INPUT: (lower, upper)}
        by_name = {step.name: step for step in self.steps}
        refined: set[str] = set()
        for step in self.steps[1:]:
            before = step.inputs[0]
            wanted = step.kind == "relu" and before not in refined
            if wanted and not self._exact(by_name[before]):
                boxes[before] = self._refined(before, boxes, x, eps)
                refined.add(before)
            boxes[step.name] = forward(step, [boxes[name] for name in step.inputs])
        last = self.steps[-1].name
        count = boxes[last][0].shape[1]
        return torch.maximum(
            self._backward(last, differences(classes, count), boxes, x, eps),
            interval_margins(self.steps, boxes, classes),
        )

    def _refined(self, name: str, boxes: dict[str, Box], x: Tensor, eps: Tensor) -> Box:
        """A value's intervals, cut by CROWN's where they cross zero: elsewhere a tighter one changes no ReLU."""
        shape = boxes[name][0].shape[1:]
        lower, upper = (side.flatten(1).clone() for side in boxes[name])
        crossing = torch.nonzero((lower < 0) & (upper > 0))
        most = max(side[0][0].numel() for side in boxes.values())
        for part in crossing.split(max(_NUMBERS // most, 1)):
            row, place = part.unbind(1)
            one = torch.zeros(len(part), lower.shape[1], dtype=x.dtype, device=x.device)
            one[torch.arange(len(part), device=x.device), place] = 1
            both = torch.stack((one, -one), 1).unflatten(2, shape)
            theirs = {key: (low[row], high[row]) for key, (low, high) in boxes.items()}
            found = self._backward(name, both, theirs, x[row], eps[row])
            lower[row, place] = torch.maximum(lower[row, place], found[:, 0])
            upper[row, place] = torch.minimum(upper[row, place], -found[:, 1])
        return lower.unflatten(1, shape), torch.maximum(upper, lower).unflatten(1, shape)

    def _exact(self, step: Step) -> bool:
        """Whether an interval cannot be tightened: it is one layer from the box."""
        return self.threat_norm == "linf" and step.inputs[0] == self.steps[1].name

    def _backward(self, name: str, a: Tensor, boxes: dict[str, Box], x: Tensor, eps: Tensor) -> Tensor:
        """(N, S) lower bounds of ⟨a, value of the step⟩, a (N, S, …)."""
        pending, constant = {name: a}, a.new_zeros(a.shape[:2])
        names = [step.name for step in self.steps]
        for step in reversed(self.steps[1 : names.index(name) + 1]):
            a_here = pending.pop(step.name, None)
            if a_here is None:
                continue
            back, shift = self._through(step, a_here, boxes)
            constant = constant + shift
            for source in step.inputs:
                pending[source] = pending[source] + back if source in pending else back
        return constant + self._at_input(pending[INPUT], boxes[INPUT], x, eps)

    @staticmethod
    def _through(step: Step, a: Tensor, boxes: dict[str, Box]) -> tuple[Tensor, Tensor]:
        if step.kind == "sum":
            return a, a.new_zeros(a.shape[:2])
        lower, upper = boxes[step.inputs[0]]
        if step.kind == "relu":
            return through_relu(a, lower, upper)
        if step.kind == "maxpool":
            return through_maxpool(step, a, lower, upper)
        return through_affine(step, a, lower.shape[1:])

    def _at_input(self, a: Tensor, box: Box, x: Tensor, eps: Tensor) -> Tensor:
        boxed = concretise(a, *box)
        if self.threat_norm == "linf":
            return boxed
        dual = self.ball().dual(a.flatten(0, 1)).view(a.shape[:2])
        centre = (a.flatten(2) * x.flatten(1)[:, None]).sum(2)
        return torch.maximum(boxed, centre - eps[:, None] * dual)
