"""Blur and resize-pad of image batches with their gradients, fused where there is a kernel.

Both are linear in the images (up to the canvas's value), so the gradient is the adjoint, and the adjoint's is the map
itself: every order of differentiation stays in two operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from robust.cuda_ops.operators import operator
from robust.cuda_ops.reference import images as reference
from robust.cuda_ops.smoothing import plain


def separable_blur(x: Tensor, kernel_y: Tensor, kernel_x: Tensor) -> Tensor:
    """Each channel of each image correlated with kernel_y ⊗ kernel_x, the edges reflected (without repeating them).

    Args:
        x: (N, C, H, W) floating point.
        kernel_y: (2r + 1,) weights down the columns, r < H.
        kernel_x: (2s + 1,) weights along the rows, s < W. No gradient flows to the kernels.

    Returns:
        (N, C, H, W) in x's dtype; sums are taken in float32 at least. A NaN spreads as far as the kernels reach.

    Raises:
        ValueError: x is no batch of images, or a kernel has an even number of taps or reaches beyond the image.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype}: floating point (N, C, H, W) is wanted")
    for kernel, length, axis in ((kernel_y, x.shape[2], "H"), (kernel_x, x.shape[3], "W")):
        if kernel.ndim != 1 or len(kernel) % 2 == 0 or len(kernel) // 2 >= max(length, 1):
            raise ValueError(
                f"kernel {tuple(kernel.shape)} for {axis}={length}: an odd number of taps, at most 2·{axis} - 1"
            )
    if plain(x):
        return reference.separable_blur(x, kernel_y, kernel_x)
    found: Tensor = _BLUR(x, kernel_y.detach(), kernel_x.detach(), False)
    return found


def resize_pad(
    x: Tensor,
    size: int,
    top: Tensor | int,
    left: Tensor | int,
    out_h: int,
    out_w: int,
    value: float = 0.0,
) -> Tensor:
    """Images resized to size × size and laid on a canvas (the transformation of Xie et al., arXiv:1711.01991).

    Args:
        x: (N, C, H, W) floating point, H and W below 2^15.
        size: height and width after bilinear resizing (corners not aligned, no antialiasing); one for the batch.
        top, left: where the resized image begins, (N,) int64 or one number for all; what leaves the canvas is cut off.
        out_h, out_w: the canvas.
        value: what the canvas is filled with, in the unit of x.

    Returns:
        (N, C, out_h, out_w) in x's dtype.

    Raises:
        ValueError: x is no batch of images, offsets that are not one per image, or a size below 1.
    """
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f"x {tuple(x.shape)} {x.dtype}: floating point (N, C, H, W) is wanted")
    if not 1 <= size < 2**15 or min(out_h, out_w) < 1 or not 1 <= max(x.shape[2:]) < 2**15:
        raise ValueError(f"size={size}, canvas {out_h}×{out_w}, images {tuple(x.shape[2:])}: in [1, 2^15)")
    for place in (top, left):
        if isinstance(place, Tensor) and place.shape != x.shape[:1]:
            raise ValueError(f"offsets {tuple(place.shape)} for {len(x)} images: one per image")
    if plain(x):
        return reference.resize_pad(x, size, top, left, out_h, out_w, value)
    places = (reference.offsets(top, x), reference.offsets(left, x))
    found: Tensor = _RESIZE(x, size, *places, *x.shape[2:], out_h, out_w, value)
    return found


def _blur(x: Tensor, kernel_y: Tensor, kernel_x: Tensor, adjoint: bool) -> Tensor:
    from robust.cuda_ops.kernels import images as kernels

    return kernels.blur(x, kernel_y, kernel_x, adjoint)


def _blur_fake(x: Tensor, kernel_y: Tensor, kernel_x: Tensor, adjoint: bool) -> Tensor:
    return x.new_empty(x.shape)


def _blur_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.adjoint = inputs[3]


def _blur_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _BLUR(gradient, *ctx.saved_tensors, not ctx.adjoint), None, None, None


def _resize(
    x: Tensor, size: int, top: Tensor, left: Tensor, h: int, w: int, out_h: int, out_w: int, value: float
) -> Tensor:
    from robust.cuda_ops.kernels import images as kernels

    return kernels.resize(x, size, top, left, (h, w), (out_h, out_w), value)


def _resize_fake(
    x: Tensor, size: int, top: Tensor, left: Tensor, h: int, w: int, out_h: int, out_w: int, value: float
) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], out_h, out_w)


def _adjoint(
    gradient: Tensor, size: int, top: Tensor, left: Tensor, h: int, w: int, out_h: int, out_w: int
) -> Tensor:
    from robust.cuda_ops.kernels import images as kernels

    return kernels.resize_adjoint(gradient, size, top, left, (h, w), (out_h, out_w))


def _adjoint_fake(
    gradient: Tensor, size: int, top: Tensor, left: Tensor, h: int, w: int, out_h: int, out_w: int
) -> Tensor:
    return gradient.new_empty(gradient.shape[0], gradient.shape[1], h, w)


def _resize_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.size, ctx.shapes = inputs[1], inputs[4:8]
    ctx.save_for_backward(inputs[2], inputs[3])


def _resize_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _RESIZE_ADJOINT(gradient, ctx.size, *ctx.saved_tensors, *ctx.shapes), *([None] * 8)


def _adjoint_gradient(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return _RESIZE(gradient, ctx.size, *ctx.saved_tensors, *ctx.shapes, 0.0), *([None] * 7)


_PLACES = "int size, Tensor top, Tensor left, int h, int w, int out_h, int out_w"
_BLUR = operator(
    "separable_blur",
    "(Tensor x, Tensor kernel_y, Tensor kernel_x, bool adjoint) -> Tensor",
    _blur,
    _blur_fake,
)
_RESIZE = operator("resize_pad", f"(Tensor x, {_PLACES}, float value) -> Tensor", _resize, _resize_fake)
_RESIZE_ADJOINT = operator(
    "resize_pad_adjoint", f"(Tensor gradient, {_PLACES}) -> Tensor", _adjoint, _adjoint_fake
)
torch.library.register_autograd("robust::separable_blur", _blur_gradient, setup_context=_blur_context)
torch.library.register_autograd("robust::resize_pad", _resize_gradient, setup_context=_resize_context)
torch.library.register_autograd(
    "robust::resize_pad_adjoint", _adjoint_gradient, setup_context=_resize_context
)
