"""Compiled programs of a twin: logits, or logits with a loss and its input gradient, as one graph for one batch shape.

The joint graph has no autograd left at run time. Its convolutions' input gradients are convolutions with weights that
are turned once, when the program is built, so that forward and backward cost the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from robust.losses import Loss, with_gradient

_AGREES = 1e-3  # of the largest entry: rounding of a float32 program
_ROUGH = 0.2  # the same for bfloat16, where the order of sums shows

Forward = Callable[[Tensor], Tensor]


class Program:
    """One graph, called with tensors of the shapes it was made for.

    Args:
        forward: x (B, C, H, W) in the box to logits (B, K), differentiable and counting nothing.
        loss: what to differentiate; None for logits alone.
        arguments: x, and with a loss y, and where the loss takes them targets and reference, by name.
        rough: whether `forward` computes in bfloat16.
        moving: whether the weights may be written to between calls; else the compiler takes them for constants.

    Raises:
        Exception: whatever the compiler raises; the caller then goes on without it.
        ValueError: the program disagrees with the function it was made of.
    """

    def __init__(
        self,
        forward: Forward,
        loss: Loss | None,
        arguments: dict[str, Tensor],
        rough: bool,
        moving: bool = False,
    ) -> None:
        self.names = list(arguments)
        self.device = arguments["x"].device
        example = [arguments[name].detach().clone() for name in self.names]
        # Blended with one another, because some losses and their gradients vanish at clean points.
        example[0] = torch.lerp(example[0], example[0].roll(1, 0), 0.1)
        function = _function(forward, loss, self.names)
        expected = function(*example)
        graph = make_fx(function, decomposition_table=_DECOMPOSED)(*example)
        with torch.no_grad(), _compiling(frozen=not moving):
            self._run = _captured(graph, example) if self.device.type == "cuda" else _compiled(graph)
            found = self._run(*example)
        for ours, theirs in zip(found, expected, strict=True):
            scale = float(theirs.nan_to_num().abs().max().clamp_min(1e-12))
            error = float((ours - theirs).nan_to_num().abs().max()) / scale
            if error > (_ROUGH if rough else _AGREES):
                raise ValueError(f"the compiled program is off by {error:.1e}")

    def __call__(self, **arguments: Tensor) -> tuple[Tensor, ...]:
        """Logits, and with a loss its value (B,) and gradient (B, C, H, W)."""
        with torch.no_grad():
            answers: tuple[Tensor, ...] = tuple(self._run(*(arguments[name] for name in self.names)))
        return answers


def _function(forward: Forward, loss: Loss | None, names: list[str]) -> Callable[..., tuple[Tensor, ...]]:
    def logits_alone(x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(x),)

    def with_loss(*tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors, strict=True))
        x = given.pop("x").detach().requires_grad_(True)
        assert loss is not None
        with torch.enable_grad():
            logits = forward(x)
        value, upstream = with_gradient(loss, logits.detach(), **given)
        (gradient,) = torch.autograd.grad(logits, x, upstream)
        return logits.detach(), value, gradient.contiguous()

    return logits_alone if loss is None else with_loss


def _compiled(graph: Any) -> Callable[..., Any]:
    """By inductor on the first call; its cache keeps the result between runs."""
    program: Callable[..., Any] = torch.compile(graph, dynamic=False)
    return program


@contextmanager
def _compiling(frozen: bool) -> Iterator[None]:
    """Frozen weights are constants, which the compiler turns and lays out once, and may merge into kernels."""
    from torch._inductor import config  # slow to import, and only compiling needs it

    # It remarks on every machine without a GPU that there is none.
    remarks = logging.getLogger("torch.utils.cpp_extension")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        with config.patch(freezing=frozen):
            yield
    finally:
        remarks.setLevel(level)


def _captured(graph: Any, example: list[Tensor]) -> Callable[..., Any]:
    """As a CUDA graph with inputs and outputs of its own."""
    inputs = [tensor.clone() for tensor in example]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            graph(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        outputs = graph(*inputs)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        recorded.replay()
        return tuple(output.clone() for output in outputs)

    return run


def _turned(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: list[int] | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    wanted: list[bool],
) -> Any:
    """A convolution's input gradient as a convolution: with turned weights where strides are one, else transposed."""
    if transposed or wanted[1] or wanted[2]:
        return NotImplemented
    axes = range(2, weight.dim())
    reach = [dilation[a - 2] * (weight.shape[a] - 1) for a in axes]
    if (
        all(step == 1 for step in stride)
        and groups == 1
        and all(r >= p for r, p in zip(reach, padding, strict=True))
    ):
        turned = weight.flip(list(axes)).transpose(0, 1)
        if weight.dim() == 4:
            turned = turned.contiguous(memory_format=torch.channels_last)
        edge = [r - p for r, p in zip(reach, padding, strict=True)]
        return (
            torch.ops.aten.convolution(
                upstream, turned, None, stride, edge, dilation, False, [0] * len(edge), 1
            ),
            None,
            None,
        )
    rest = [
        x.shape[a] - ((upstream.shape[a] - 1) * stride[a - 2] - 2 * padding[a - 2] + reach[a - 2] + 1)
        for a in axes
    ]
    return (
        torch.ops.aten.convolution(upstream, weight, None, stride, padding, dilation, True, rest, groups),
        None,
        None,
    )


_DECOMPOSED = {torch.ops.aten.convolution_backward.default: _turned}
