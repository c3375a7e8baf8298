"""A network as the steps that bounds are carried through: affine maps, ReLU, max pooling and sums."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from robust.classifier import Classifier
from robust.errors import ModelError, first_line
from robust.folding import fold

Map = Callable[[Tensor], Tensor]

INPUT = "input"
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_POSITIVE = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d),
)
_POSITIVE_CALLS = (
    *(torch.flatten, torch.mean, torch.sum, F.avg_pool2d, F.adaptive_avg_pool2d, operator.getitem),
)
_POSITIVE_METHODS = ("flatten", "mean", "sum", "contiguous")
_SHAPES = ("size", "dim")
SUPPORTED = "Linear, Conv, BatchNorm, ReLU, MaxPool2d, average pooling, Flatten and sums"


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        name: of its value. kind: input, affine, relu, maxpool or sum.
        inputs: the names of the values it takes, each (B, …).
        call: what it does to its one input. magnitude: of an affine step, |slope| · radius, elementwise.
    """

    name: str
    kind: str
    inputs: tuple[str, ...] = ()
    call: Map | None = None
    magnitude: Map | None = None
    pool: nn.MaxPool2d | None = None


def trace(clf: Classifier, method: str) -> list[Step]:
    """The steps from a point of the box to the logits in float64, normalisation first and batch norms folded.

    Raises:
        ModelError: one line that names the layer that has no bounds.
    """
    try:
        traced, _ = fold(clf.module)
    except Exception as error:
        raise ModelError(
            f"{method}: {clf.name} cannot be traced ({first_line(error)}); bounds need a plain graph of {SUPPORTED}"
        ) from error
    assert isinstance(traced, fx.GraphModule)
    traced = traced.double().eval().requires_grad_(False)
    reader = _Reader(clf, traced, method)
    for node in traced.graph.nodes:
        reader.read(node)
    return reader.steps


class _Reader:
    """Turns the nodes of a graph into steps, one by one."""

    def __init__(self, clf: Classifier, traced: fx.GraphModule, method: str) -> None:
        self.traced, self.method = traced, method
        self.steps = [Step(INPUT, INPUT)]
        self.names: dict[fx.Node, str] = {}
        mean, std = clf.mean.double(), clf.std.double()

        def shaped(values: Tensor, x: Tensor) -> Tensor:
            return values.view(1, -1, *[1] * (x.dim() - 2))

        self.normalise: Map = lambda x: (x - shaped(mean, x)) / shaped(std, x)
        self.spread: Map = lambda r: r / shaped(std, r)

    def read(self, node: fx.Node) -> None:
        """One node: a step more, or a name for an earlier value."""
        if node.op == "placeholder":
            if self.names or node.users == {}:
                return
            self._add(node, Step("normalised", "affine", (INPUT,), self.normalise, self.spread))
        elif node.op == "output":
            last = node.args[0]
            if not isinstance(last, fx.Node) or self.names.get(last) != self.steps[-1].name:
                raise self._refuse(node, "output")
        elif node.op == "call_module":
            self._module(node, self.traced.get_submodule(str(node.target)))
        elif node.op in ("call_function", "call_method"):
            self._call(node)
        else:
            raise self._refuse(node, node.op)

    def _add(self, node: fx.Node, step: Step) -> None:
        self.steps.append(step)
        self.names[node] = step.name

    def _refuse(self, node: fx.Node, what: str) -> ModelError:
        place = node.target if isinstance(node.target, str) else node.name
        return ModelError(f"{self.method}: layer {place} ({what}) has no bounds; known are {SUPPORTED}")

    def _inputs(self, node: fx.Node) -> tuple[str, ...]:
        return tuple(self.names[arg] for arg in node.args if isinstance(arg, fx.Node) and arg in self.names)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        inputs, kind = self._inputs(node), type(module)
        if len(inputs) != 1 or len(node.args) + len(node.kwargs) != 1:
            raise self._refuse(node, kind.__name__)
        if kind is nn.ReLU:
            plain = module if not module.inplace else nn.ReLU()
            self._add(node, Step(node.name, "relu", inputs, plain))
        elif isinstance(module, nn.MaxPool2d) and kind is nn.MaxPool2d and not module.return_indices:
            self._add(node, Step(node.name, "maxpool", inputs, module, pool=module))
        elif kind in _WEIGHTED:
            self._add(node, Step(node.name, "affine", inputs, module, _absolute(module)))
        elif kind in _NORMS and module.running_var is not None:
            self._add(node, Step(node.name, "affine", inputs, module, _slope(module)))
        elif kind in _POSITIVE:
            self._add(node, Step(node.name, "affine", inputs, module, module))
        else:
            raise self._refuse(node, kind.__name__)

    def _call(self, node: fx.Node) -> None:
        target, inputs = node.target, self._inputs(node)
        if target in _SHAPES or target is getattr:
            return  # sizes, which only a reshape may use
        if target in (F.relu, torch.relu, "relu", "relu_") and len(inputs) == 1:
            self._add(node, Step(node.name, "relu", inputs, torch.relu))
        elif target in (operator.add, torch.add, operator.iadd) and len(inputs) == 2 and not node.kwargs:
            self._add(node, Step(node.name, "sum", inputs))
        elif target in ("view", "reshape") and len(inputs) == 1 and node.args[2:] == (-1,):
            flat: Map = lambda x: x.flatten(1)  # noqa: E731
            self._add(node, Step(node.name, "affine", inputs, flat, flat))
        elif (call := self._positive(node)) is not None:
            self._add(node, Step(node.name, "affine", inputs, call, call))
        elif target in (F.max_pool2d, torch.max_pool2d) and (pool := _pool(node)) is not None:
            self._add(node, Step(node.name, "maxpool", inputs, pool, pool=pool))
        elif target is operator.getitem and not inputs:
            return  # of a shape
        else:
            raise self._refuse(node, target if isinstance(target, str) else target.__name__)

    def _positive(self, node: fx.Node) -> Map | None:
        """A linear map with no negative slope, or None: its other arguments are numbers."""
        target, rest, named = node.target, node.args[1:], dict(node.kwargs)
        if len(self._inputs(node)) != 1 or any(isinstance(leaf, fx.Node) for leaf in _leaves((rest, named))):
            return None
        if target in _POSITIVE_CALLS or (target is F.pad and not _padded(rest, named)):
            function: Any = target
            return lambda x: function(x, *rest, **named)
        if target in _POSITIVE_METHODS:
            return lambda x: getattr(x, str(target))(*rest, **named)
        return None


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, slice):
        value = (value.start, value.stop, value.step)
    return [leaf for part in value for leaf in _leaves(part)] if isinstance(value, (tuple, list)) else [value]


def _padded(rest: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Whether padding is with anything but zeros."""
    given = dict(zip(("pad", "mode", "value"), rest, strict=False)) | named
    return given.get("mode", "constant") != "constant" or bool(given.get("value"))


def _pool(node: fx.Node) -> nn.MaxPool2d | None:
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given: dict[str, Any] = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    if given.pop("return_indices", False) or any(isinstance(leaf, fx.Node) for leaf in _leaves(given)):
        return None
    return nn.MaxPool2d(**given)


def _absolute(module: nn.Module) -> Map:
    """|W| · radius, without a bias."""
    positive: Any = copy.deepcopy(module)
    positive.weight = nn.Parameter(positive.weight.abs(), requires_grad=False)
    positive.bias = None
    found: Map = positive
    return found


def _slope(module: nn.Module) -> Map:
    """|scale| · radius of a normalisation with its running statistics."""

    def call(radius: Tensor) -> Tensor:
        found: Tensor = module(radius) - module(torch.zeros_like(radius))
        return found.abs()

    return call
