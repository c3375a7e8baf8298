"""Per-sample gradients of convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.defenses.privacy.gradients.parts import Part, Rows
from robust.defenses.privacy.gradients.rule import Parts, Rule, autocast, value


class Convolution(Rule):
    """Convolutions with any stride, padding, dilation and groups.

    The weight's gradients of B samples are those of one convolution with B times the groups: one call of the library's
    kernel, which writes them out.
    """

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def prepare(self, module: Any, x: Tensor) -> Tensor:
        """See `Rule`; padding that a convolution's own argument cannot express is put on here."""
        x = autocast(x)
        if module.padding_mode != "zeros":
            return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        if module.padding == "same" and _own_padding(module) is None:
            return F.pad(x, module._reversed_padding_repeated_twice)
        return x

    def forward(self, module: Any, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """See `Rule`."""
        weight, bias = value(module.weight, x), value(module.bias, x)
        settings = (module.stride, _padding(module), module.dilation)
        none = (0,) * len(module.kernel_size)
        out = torch.convolution(x, weight, bias, *settings, False, none, module.groups)
        return out, (x,)

    def backward(
        self, module: Any, saved: tuple[Tensor, ...], grad: Tensor, wants_x: bool
    ) -> tuple[Tensor | None, Parts]:
        """See `Rule`."""
        (x,) = saved
        parts: Parts = {"weight": _weight(module, x, grad)}
        if module.bias is not None:
            parts["bias"] = Rows(grad.flatten(2).sum(2))
        return (_input(module, x, grad) if wants_x else None), parts


def _own_padding(module: Any) -> tuple[int, ...] | None:
    """Zeros on both sides of each dimension as the kernel takes them; None where the sides differ ("same")."""
    if module.padding_mode != "zeros" or module.padding == "valid":
        return (0,) * len(module.kernel_size)
    if module.padding == "same":
        spans = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return None if any(span % 2 for span in spans) else tuple(span // 2 for span in spans)
    return tuple(module.padding)


def _padding(module: Any) -> tuple[int, ...]:
    return _own_padding(module) or (0,) * len(module.kernel_size)


def _derive(
    module: Any, grad: Tensor, x: Tensor, weight: Tensor, groups: int, mask: tuple[bool, bool, bool]
) -> tuple[Tensor, ...]:
    none = (0,) * len(module.kernel_size)
    settings = (module.stride, _padding(module), module.dilation, False, none, groups, mask)
    found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(grad, x, weight, None, *settings)
    return found


def _input(module: Any, x: Tensor, grad: Tensor) -> Tensor:
    weight = value(module.weight, grad)
    assert weight is not None
    return _derive(module, grad, x, weight, module.groups, (True, False, False))[0]


def _weight(module: Any, x: Tensor, grad: Tensor) -> Part:
    shape, rows = module.weight.shape, len(x)
    if rows == 0:
        return Rows(grad.new_zeros(0, *shape))
    wide_x, wide_g = (part.reshape(1, -1, *part.shape[2:]) for part in (x, grad))
    weight = grad.new_empty(1).expand(rows * shape[0], *shape[1:])  # only its shape is read
    found = _derive(module, wide_g, wide_x, weight, rows * module.groups, (False, True, False))[1]
    return Rows(found.view(rows, *shape))
