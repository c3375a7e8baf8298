"""Depthwise blur, and bilinear resizing into a canvas, in plain PyTorch; both are differentiable in the images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def working(x: Tensor) -> Tensor:
    """`x` in the precision in which sums are taken: float32, or its own if that is float64."""
    return x if x.dtype == torch.float64 else x.float()


def separable_blur(x: Tensor, kernel_y: Tensor, kernel_x: Tensor) -> Tensor:
    """See `robust.cuda_ops.separable_blur`."""
    rows, channels, height, width = x.shape
    if x.numel() == 0:
        return x.clone()
    planes = working(x).reshape(rows * channels, 1, height, width)
    ky, kx = kernel_y.detach().to(planes), kernel_x.detach().to(planes)
    ry, rx = len(ky) // 2, len(kx) // 2
    padded = F.pad(planes, (rx, rx, ry, ry), mode="reflect")
    blurred = F.conv2d(F.conv2d(padded, ky.view(1, 1, -1, 1)), kx.view(1, 1, 1, -1))
    return blurred.view(x.shape).to(x.dtype)


class _Shift(torch.autograd.Function):
    """out[b, c, i, j] = x[b, c, i - top_b, j - left_b], and `value` outside x. Its adjoint is a shift back."""

    @staticmethod
    def forward(x: Tensor, top: Tensor, left: Tensor, height: int, width: int, value: float) -> Tensor:
        """Gather, for top and left (N,) int64."""
        rows, channels, old_height, old_width = x.shape
        iy = torch.arange(height, device=x.device) - top[:, None]
        ix = torch.arange(width, device=x.device) - left[:, None]
        inside = ((iy >= 0) & (iy < old_height))[:, :, None] & ((ix >= 0) & (ix < old_width))[:, None]
        picked = x[
            torch.arange(rows, device=x.device)[:, None, None, None],
            torch.arange(channels, device=x.device)[:, None, None],
            iy.clamp_(0, old_height - 1)[:, None, :, None],
            ix.clamp_(0, old_width - 1)[:, None, None],
        ]
        return picked.masked_fill_(~inside[:, None], value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the offsets and the size to shift back to."""
        x, top, left, *_ = inputs
        ctx.save_for_backward(top, left)
        ctx.size = x.shape[2:]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        """The adjoint, differentiable itself."""
        top, left = ctx.saved_tensors
        return _Shift.apply(gradients[0], -top, -left, *ctx.size, 0.0), None, None, None, None, None


def offsets(place: Tensor | int, x: Tensor) -> Tensor:
    """An offset for every image, (N,) int64."""
    if isinstance(place, Tensor):
        return place
    return torch.full((len(x),), place, dtype=torch.int64, device=x.device)


def resize_pad(
    x: Tensor,
    size: int,
    top: Tensor | int,
    left: Tensor | int,
    out_h: int,
    out_w: int,
    value: float = 0.0,
) -> Tensor:
    """See `robust.cuda_ops.resize_pad`."""
    if x.numel() == 0:
        return x.new_full((*x.shape[:2], out_h, out_w), value)
    resized = F.interpolate(working(x), (size, size), mode="bilinear", align_corners=False)
    place = (offsets(top, x), offsets(left, x))
    placed: Tensor = _Shift.apply(resized, *place, out_h, out_w, value)
    return placed.to(x.dtype)
