"""Batch normalisation folded into the convolution or linear layer before it: the same function in fewer passes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import (
    fuse_conv_bn_eval,
    fuse_conv_bn_weights,
    fuse_linear_bn_eval,
    fuse_linear_bn_weights,
)

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold(module: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a module in evaluation mode with its batch normalisations folded, and the layer → norm of each.

    A normalisation is folded where a layer feeds nothing but it, each is used once, and it normalises with its
    running statistics. The copy shares no tensor with `module`.

    Raises:
        Exception: whatever tracing or copying raises; the caller then goes on with the module as it is.
    """
    traced = fx.symbolic_trace(copy.deepcopy(module).eval())
    folded: dict[str, str] = {}
    for norm in [node for node in traced.graph.nodes if _calls(traced, node, _NORMS)]:
        layer = norm.args[0] if norm.args else None
        if isinstance(layer, fx.Node) and _foldable(traced, layer, norm):
            fused = _fuse(traced.get_submodule(str(layer.target)), traced.get_submodule(str(norm.target)))
            _replace(traced, str(layer.target), fused)
            norm.replace_all_uses_with(layer)
            traced.graph.erase_node(norm)
            folded[str(layer.target)] = str(norm.target)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced, folded


@torch.no_grad()
def refold(copied: nn.Module, module: nn.Module, folded: dict[str, str]) -> None:
    """Writes a module's present weights into a copy that `fold` made of it, in place: compiled graphs see them.

    Args:
        copied: the copy, in any arithmetic and memory format; module: what it was made of; folded: as `fold` said.
    """
    source = module.state_dict()
    for name, value in copied.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if layer in folded:
            fused = _fused_weights(module, layer, folded[layer])
            value.copy_(fused[0] if kind == "weight" else fused[1])
        elif name in source:  # tracing may have made constants of its own
            value.copy_(source[name])


def _fused_weights(module: nn.Module, layer: str, norm: str) -> tuple[Tensor, Tensor]:
    first, second = module.get_submodule(layer), module.get_submodule(norm)
    fuse = fuse_linear_bn_weights if isinstance(first, nn.Linear) else fuse_conv_bn_weights
    rest = (second.running_mean, second.running_var, second.eps, second.weight, second.bias)
    return fuse(first.weight, first.bias, *rest)  # type: ignore[arg-type]


def _calls(traced: fx.GraphModule, node: fx.Node, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a node calls a module of exactly one of these kinds; a subclass may do anything."""
    return node.op == "call_module" and type(traced.get_submodule(str(node.target))) in kinds


def _foldable(traced: fx.GraphModule, layer: fx.Node, norm: fx.Node) -> bool:
    if not _calls(traced, layer, (*_CONVOLUTIONS, nn.Linear)) or len(layer.users) != 1:
        return False
    if len(norm.args) + len(norm.kwargs) != 1 or _uses(traced, layer) != 1 or _uses(traced, norm) != 1:
        return False
    first, second = traced.get_submodule(str(layer.target)), traced.get_submodule(str(norm.target))
    if isinstance(second, _NORMS) and second.running_var is None:
        return False
    if isinstance(
        first, nn.Linear
    ):  # BatchNorm1d takes dimension 1, which is the features only in (N, features)
        return isinstance(second, nn.BatchNorm1d) and first.out_features == second.num_features
    return not (_hooked(first) or _hooked(second))


def _hooked(module: nn.Module) -> bool:
    """Whether something else happens at a call of the module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "parametrizations"))


def _uses(traced: fx.GraphModule, node: fx.Node) -> int:
    """How many nodes call the node's module, by this name or another."""
    module = traced.get_submodule(str(node.target))
    return sum(
        1
        for other in traced.graph.nodes
        if other.op == "call_module" and traced.get_submodule(str(other.target)) is module
    )


def _fuse(layer: nn.Module, norm: nn.Module) -> nn.Module:
    assert isinstance(norm, _NORMS)
    with torch.no_grad():
        if isinstance(layer, nn.Linear):
            return fuse_linear_bn_eval(layer, norm)
        assert isinstance(layer, _CONVOLUTIONS)
        return fuse_conv_bn_eval(layer, norm)


def _replace(traced: fx.GraphModule, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(traced.get_submodule(parent), name, module)
