"""Per-sample gradients of convolutions in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robust.cuda_ops import per_sample_norm
from robust.defenses.privacy.gradients.arena import Arena
from robust.defenses.privacy.gradients.parts import Outer, Part, Rows
from robust.defenses.privacy.gradients.products import few
from robust.defenses.privacy.gradients.rule import Parts, Rule, autocast, value

_CACHED = 1 << 18  # numbers of windows that are copied at a time: they stay in the cache of a core


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
        assert weight is not None
        settings = (module.stride, _padding(module), module.dilation)
        none = (0,) * len(module.kernel_size)
        out = torch.convolution(x, weight, bias, *settings, False, none, module.groups)
        return out, (x,)

    def backward(
        self, module: Any, saved: tuple[Tensor, ...], grad: Tensor, wants_x: bool, arena: Arena
    ) -> tuple[Tensor | None, Parts]:
        """See `Rule`."""
        (x,) = saved
        parts: Parts = {"weight": _weight(module, x, grad, arena)}
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
    points = weight.ndim == 4 and weight[0, 0].numel() == 1 and not any(_padding(module))
    if points and module.groups == 1 and module.stride != (1, 1):
        found = grad.new_zeros(x.shape)  # a product on some of the points; the kernel would work on all
        found[..., :: module.stride[0], :: module.stride[1]] = F.conv2d(grad, weight.transpose(0, 1))
        return found
    return _derive(module, grad, x, weight, module.groups, (True, False, False))[0]


def _weight(module: Any, x: Tensor, grad: Tensor, arena: Arena) -> Part:
    """The weight's gradients of all samples, by the way that is fastest for such a layer.

    Measured on a CPU: the library's grouped kernel is near its plain one where it works in blocks of 16 channels on
    large images. Elsewhere products with windows that are copied a few samples at a time, so that they stay in the
    cache, are two to three times faster; whole rows of a kernel are copied at once where channels are many.
    """
    shape, rows = module.weight.shape, len(x)
    if rows == 0:
        return Rows(grad.new_zeros(0, *shape))
    d, p, positions = shape[0], shape[1:].numel(), grad[0, 0].numel()
    if module.groups == 1 and len(shape) == 4 and few(rows, positions, p, d):
        settings = (module.dilation, _padding(module), module.stride)
        return Outer(F.unfold(x, shape[2:], *settings).mT, grad.flatten(2).mT, shape)
    blocks = d % 16 == 0 and shape[1] % 16 == 0 and positions >= 256
    if module.groups > 1 or len(shape) != 4 or blocks or x.is_cuda:
        return _grouped(module, x, grad)
    write = _windows if shape[1] >= 8 else _columns
    return write(module, x, grad, arena)


def _grouped(module: Any, x: Tensor, grad: Tensor) -> Part:
    shape, rows = module.weight.shape, len(x)
    wide_x, wide_g = (part.reshape(1, -1, *part.shape[2:]) for part in (x, grad))
    weight = grad.new_empty(1).expand(rows * shape[0], *shape[1:])  # only its shape is read
    found = _derive(module, wide_g, wide_x, weight, rows * module.groups, (False, True, False))[1]
    return Rows(found.view(rows, *shape))


def _columns(module: Any, x: Tensor, grad: Tensor, arena: Arena) -> Part:
    """Windows as columns, (C · kh · kw, T)."""
    shape, rows = module.weight.shape, len(x)
    (h, w), (sh, sw), (dh, dw) = _padding(module), module.stride, module.dilation
    ho, wo = grad.shape[2:]
    size, few_rows = shape[1:].numel(), _samples(shape[1:].numel() * ho * wo, rows)
    found, norms = arena.take((rows, shape[0], size), grad), []
    copied = x.new_empty(few_rows, *shape[1:], ho, wo)
    for first in range(0, rows, few_rows):
        part = slice(first, first + few_rows)
        padded = F.pad(x[part], (w, w, h, h)).contiguous()
        n, (sb, sc, sy, sx) = len(padded), padded.stride()
        copied[:n].copy_(
            padded.as_strided((n, *shape[1:], ho, wo), (sb, sc, dh * sy, dw * sx, sh * sy, sw * sx))
        )
        torch.bmm(grad[part].flatten(2), copied[:n].view(n, size, ho * wo).mT, out=found[part])
        norms.append(per_sample_norm(found[part]))
    return Rows(found.view(rows, *shape), torch.cat(norms))


def _windows(module: Any, x: Tensor, grad: Tensor, arena: Arena) -> Part:
    """Windows as rows, (T, kh · kw · C), from images with channels last, so that long runs are copied."""
    (d, c, kh, kw), rows = module.weight.shape, len(x)
    (h, w), (sh, sw), (dh, dw) = _padding(module), module.stride, module.dilation
    tall, wide, ho, wo = *x.shape[2:], *grad.shape[2:]
    few_rows = _samples(c * kh * kw * ho * wo, rows)
    found = arena.take((rows, d, kh * kw * c), grad)
    copied = x.new_empty(few_rows, ho, wo, kh, kw, c)
    padded = x.new_zeros(few_rows, tall + 2 * h, wide + 2 * w, c)
    inside, (sb, sy, sx, _) = padded[:, h : h + tall, w : w + wide], padded.stride()
    seen = padded.as_strided(copied.shape, (sb, sh * sy, sw * sx, dh * sy, dw * sx, 1))
    flat, windows, norms = grad.flatten(2), copied.view(few_rows, ho * wo, kh * kw * c), []
    for first in range(0, rows, few_rows):
        part = slice(first, first + few_rows)
        n = min(few_rows, rows - first)
        inside[:n].copy_(x[part].permute(0, 2, 3, 1))
        copied[:n].copy_(seen[:n])
        torch.bmm(flat[part], windows[:n], out=found[part])
        norms.append(per_sample_norm(found[part]))  # while they are in the cache
    return Rows(found.view(rows, d, kh, kw, c), torch.cat(norms), order=(2, 0, 1))


def _samples(numbers: int, rows: int) -> int:
    """How many samples to work on at a time, if each has windows of so many numbers."""
    return min(max(_CACHED // max(numbers, 1), 1), rows)
