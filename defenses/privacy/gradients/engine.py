"""The gradient engine: one forward and one backward, in which every layer keeps its samples' gradients apart.

While the model trains, each layer with parameters runs behind a tap: its parameters are taken out of autograd's graph,
and its backward gives the input's gradient and the parameters' per-sample gradients, in the cheapest form. When the
backward pass ends, they are handed on. Outside of training (evaluation mode, no gradients) the taps do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

from robust.defenses.privacy.gradients.arena import Arena
from robust.defenses.privacy.gradients.bare import Bare
from robust.defenses.privacy.gradients.convolutions import Convolution
from robust.defenses.privacy.gradients.norms import GroupNorm, LayerNorm
from robust.defenses.privacy.gradients.parts import Part, add
from robust.defenses.privacy.gradients.probe import probe
from robust.defenses.privacy.gradients.products import Embedding, Linear
from robust.defenses.privacy.gradients.rule import Parts, Rule
from robust.errors import ModelError

RULES: tuple[Rule, ...] = (Linear(), Convolution(), Embedding(), LayerNorm(), GroupNorm())


class Consumer(Protocol):
    """Who the engine hands gradients to."""

    def consume(self, rows: int, parts: Sequence[Part]) -> None:
        """Takes the per-sample gradients of one backward pass, a part for each parameter."""

    def consume_empty(self) -> None:
        """Hears of a forward on no samples."""


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of a layer; None for layers that only differentiating them sample by sample can serve."""
    for rule in RULES:
        for kind in rule.kinds:
            if isinstance(module, kind) and _inherits(type(module), kind):
                return rule
    return None


def _inherits(kind: type, base: type) -> bool:
    names = ("forward", "_conv_forward")
    return all(getattr(kind, name, None) is getattr(base, name, None) for name in names)


class Engine:
    """Per-sample gradients of `parameters` of a model.

    Args:
        model: whose layers are tapped, in place; its names, state and type stay as they are.
        parameters: by their names in the model; they require gradients.
        consumer: told at the end of every backward pass of the number of samples and the parameters' gradients.

    The first dimension of the model's input, and of every layer's, is the batch; one backward pass is one set of
    samples, and two forwards in one loss are two looks at the same samples, row by row.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], consumer: Consumer) -> None:
        self.model, self.consumer = model, consumer
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.number = {id(parameter): i for i, parameter in enumerate(self.parameters)}
        self.rows: int | None = None
        self._paused = 0
        self._task = -1
        self.arena = Arena()
        self._found: list[list[Part]] = [[] for _ in self.parameters]
        self._seen: set[int] = set()
        self._token = torch.zeros((), requires_grad=True)
        self._sink: Any = _sink(self._token)
        self.layers: list[tuple[str, nn.Module]] = []
        for name, module in model.named_modules():
            own = {key: p for key, p in module._parameters.items() if p is not None and id(p) in self.number}
            if own:
                module.__dict__["forward"] = Tap(self, name or type(module).__name__, module, own)
                self.layers.append((name or type(module).__name__, module))
        gate = Gate(self)
        self._hooks = [
            model.register_forward_pre_hook(gate.enter, prepend=True, with_kwargs=True),
            model.register_forward_hook(gate.leave, always_call=True),
        ]

    @property
    def recording(self) -> bool:
        """Whether layers keep per-sample gradients now: the model trains, with gradients, and is not empty."""
        return self.model.training and self._paused == 0 and torch.is_grad_enabled()

    def release(self) -> None:
        """The model as it was before."""
        for _, module in self.layers:
            del module.__dict__["forward"]
        for hook in self._hooks:
            hook.remove()
        self.layers, self._hooks = [], []

    def pause(self) -> None:
        """Layers run as they are until `unpause`."""
        self._paused += 1

    def unpause(self) -> None:
        """Ends one `pause`."""
        self._paused -= 1

    def check_rows(self, x: Tensor, where: str) -> None:
        """Raises one line unless the first dimension of a layer's input is the model's batch."""
        if self.rows is not None and (x.ndim == 0 or x.shape[0] != self.rows):
            raise ModelError(
                f"{where} gets an input {tuple(x.shape)} in a batch of {self.rows}: its first dimension must be the "
                "batch, or its parameters have no per-sample gradient"
            )

    def wanted(self) -> bool:
        """Whether the backward pass that runs is one for parameters, and not only for inputs that were named."""
        return bool(torch._C._will_engine_execute_node(self._sink))

    def record(self, owners: Mapping[str, nn.Parameter], parts: Parts, rows: int) -> int:
        """Takes a layer's per-sample gradients, in a backward pass; the number of that pass."""
        task = torch._C._current_graph_task_id()
        if task != self._task:
            self._task, self._found, self._seen = task, [[] for _ in self.parameters], set()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        self._seen.add(rows)
        for key, parameter in owners.items():
            if key in parts:
                self._found[self.number[id(parameter)]].append(parts[key])
        return task

    def _finish(self) -> None:
        found, self._found, self._task = self._found, [[] for _ in self.parameters], -1
        if len(self._seen) != 1:
            raise ModelError(
                f"layers saw batches of {sorted(self._seen)} samples in one backward pass; let all see one"
            )
        unused = [name for name, parts in zip(self.names, found, strict=True) if not parts]
        if unused:
            raise ModelError(
                f"parameter {unused[0]} took no part in the loss ({len(unused)} did not); freeze it by "
                "requires_grad_(False), and leave it out of the optimizer"
            )
        (rows,) = self._seen
        with torch.no_grad():
            self.consumer.consume(rows, [add(parts) for parts in found])
        del found
        self.arena.reset()


def _sink(token: Tensor) -> Any:
    """The node of autograd's graph in which a leaf's gradient arrives."""
    node = token.view_as(token).grad_fn
    assert node is not None
    return node.next_functions[0][0]


class Tap:
    """A layer's forward in training; copies of the model get the layer's own forward back."""

    def __init__(self, engine: Engine, name: str, module: nn.Module, owners: dict[str, nn.Parameter]) -> None:
        self.engine, self.name, self.module, self.owners = engine, name, module, owners
        self.original = module.forward
        self.rule = rule_of(module)
        self.bare = Bare(module, self.original, tuple(owners)) if self.rule is None else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output."""
        if not self.engine.recording:
            return self.original(*args, **kwargs)
        if self.rule is None:
            return self._bare(args, kwargs)
        (x,) = [*args, *kwargs.values()]
        self.engine.check_rows(x, self.name)
        return _Layer.apply(self.engine._token.to(x.device), self.rule.prepare(self.module, x), self)

    def _bare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.bare is not None
        call = self.bare.begin(args, kwargs, self.engine.rows)
        outs = [out for out in call.outputs if isinstance(out, Tensor) and out.is_floating_point()]
        if not outs:
            return call.result(call.outputs)
        self.engine.check_rows(outs[0], self.name)
        watched = iter(_Watch.apply(self.engine._token.to(outs[0].device), self, call, *outs))
        kept = [next(watched) if isinstance(o, Tensor) and o.is_floating_point() else o for o in call.outputs]
        return call.result(kept)

    def book(self, context: Any, parts: Parts, rows: int) -> None:
        """Hands per-sample gradients to the engine, once for every forward.

        Raises:
            ModelError: a second backward pass through one forward, which would count its samples twice.
        """
        task = self.engine.record(self.owners, parts, rows)
        if getattr(context, "task", task) != task:
            raise ModelError(
                f"{self.name}: a second backward pass through one forward counts its samples twice; "
                "add the losses first"
            )
        context.task = task

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The plain forward of the layer's copy."""
        return MethodType(type(self.module).forward, memo[id(self.module)])

    def __reduce__(self) -> Any:
        """Pickled, too, as the plain forward."""
        return MethodType, (type(self.module).forward, self.module)


class _Layer(torch.autograd.Function):
    """A layer with a rule."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, x: Tensor, tap: Tap) -> Tensor:
        assert tap.rule is not None
        out, saved = tap.rule.forward(tap.module, x)
        ctx.tap = tap
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        tap: Tap = ctx.tap
        assert tap.rule is not None
        wants_x = ctx.needs_input_grad[1]
        grad_x, parts = tap.rule.backward(tap.module, ctx.saved_tensors, grad, wants_x, tap.engine.arena)
        if tap.engine.wanted():
            tap.book(ctx, parts, len(grad))
        return None, grad_x, None


class _Watch(torch.autograd.Function):
    """Sees the gradients of the outputs of a layer without a rule."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, tap: Tap, call: Any, *outs: Tensor) -> tuple[Tensor, ...]:
        ctx.tap, ctx.call = tap, call
        return tuple(out.view_as(out) for out in outs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tap: Tap = ctx.tap
        if tap.engine.wanted():
            tap.engine.pause()
            try:
                parts = ctx.call.parts(grads, tap.name)
            finally:
                tap.engine.unpause()
            tap.book(ctx, parts, len(grads[0]))
        return None, None, None, *grads


class Recorder(Protocol):
    """An engine, as its model's hooks see it."""

    rows: int | None
    consumer: Consumer
    layers: list[tuple[str, nn.Module]]

    @property
    def recording(self) -> bool:
        """Whether per-sample gradients are kept now."""

    def pause(self) -> None:
        """Layers run as they are until `unpause`."""

    def unpause(self) -> None:
        """Ends one `pause`."""


class Gate:
    """Hooks of the whole model: they note the batch's size, and let an empty batch pass.

    Many models cannot take one: it becomes one sample of zeros, and its outputs are cut off again.
    """

    def __init__(self, engine: Recorder) -> None:
        self.engine, self.empty, self.probed = engine, False, False

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the model's forward."""
        engine = self.engine
        if not engine.recording:
            return None
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim]
        engine.rows = len(given[0]) if given else None
        if engine.rows != 0:
            self._probe(module, args, kwargs)
            return None
        self.empty = True
        engine.consumer.consume_empty()
        engine.pause()
        return tree_map(_one, args), tree_map(_one, kwargs)

    def _probe(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Once, with the first batch of several samples."""
        rows = self.engine.rows
        if self.probed or rows is None or rows < 2:
            return
        self.probed = True
        self.engine.pause()
        try:
            probe(module, self.engine.layers, args, kwargs, rows)
        finally:
            self.engine.unpause()
            self.engine.rows = rows

    def leave(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After it."""
        if not self.empty:
            return None
        self.empty = False
        self.engine.unpause()
        return tree_map(_none, output)

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        copy = Gate.__new__(Gate)
        copy.engine, copy.empty, copy.probed = _Asleep(), False, True  # type: ignore[assignment]
        return copy


class _Asleep:
    """What the hooks of a copied model see."""

    recording = False


def _one(value: Any) -> Any:
    return value.new_zeros(1, *value.shape[1:]) if isinstance(value, Tensor) and value.ndim else value


def _none(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    nothing = value.detach()[:0]
    return nothing.requires_grad_() if nothing.is_floating_point() else nothing
