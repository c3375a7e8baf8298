# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
"""Launches of the depthwise blur and of bilinear resizing into a canvas, each with its adjoint.

Both adjoints gather: a program owns a tile of the result and adds up, so nothing is atomic and the sums have one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_DIRECT = 25  # taps up to which one pass that loads them all is cheaper than two passes over memory


@triton.jit
def _tap(kernel, tap, at, size, TAPS: tl.constexpr, ADJOINT: tl.constexpr):
    """Source and weight of one tap for the positions `at` of an axis of `size`.

    Forward: out[p] = Σ k[t] · x[reflect(p + t - r)]. Adjoint: with d = t - r, the source y = p + d counts for itself
    with k[r - d], for its image left of the edge with k[r - d - 2p], right of it with k[r - d + 2(size - 1 - p)].
    """
    source = at + tap - TAPS // 2
    if ADJOINT:
        own = TAPS - 1 - tap
        left = own - 2 * at
        right = own + 2 * (size - 1 - at)
        weight = tl.load(kernel + own)
        weight += tl.load(kernel + left, mask=(left >= 0) & (at >= 1), other=0.0)
        weight += tl.load(kernel + right, mask=(right < TAPS) & (right >= 0) & (at < size - 1), other=0.0)
        valid = (source >= 0) & (source < size) & (at < size)
    else:
        source = tl.abs(source)
        source = tl.where(source < size, source, 2 * (size - 1) - source)
        weight = tl.load(kernel + tap) + tl.zeros(at.shape, tl.float32)
        valid = at < size
    return source, weight, valid


@triton.jit
def _blur(
    x, out, kernel_y, kernel_x, height, width,
    TAPS_Y: tl.constexpr, TAPS_X: tl.constexpr, ADJOINT: tl.constexpr, TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
):  # fmt: skip
    """One tile of one plane, all taps."""
    across = tl.cdiv(width, TILE_X)
    tiles = across * tl.cdiv(height, TILE_Y)
    tile = tl.program_id(0) % tiles
    base = (tl.program_id(0) // tiles).to(tl.int64) * height * width
    ys = tile // across * TILE_Y + tl.arange(0, TILE_Y)
    xs = tile % across * TILE_X + tl.arange(0, TILE_X)
    total = tl.zeros((TILE_Y, TILE_X), tl.float32)
    for i in range(TAPS_Y):
        row, weight_y, valid_y = _tap(kernel_y, i, ys, height, TAPS_Y, ADJOINT)
        for j in range(TAPS_X):
            column, weight_x, valid_x = _tap(kernel_x, j, xs, width, TAPS_X, ADJOINT)
            mask = valid_y[:, None] & valid_x[None, :]
            value = tl.load(x + base + row[:, None] * width + column[None, :], mask=mask, other=0.0)
            total += weight_y[:, None] * weight_x[None, :] * value.to(tl.float32)
    inside = (ys < height)[:, None] & (xs < width)[None, :]
    tl.store(out + base + ys[:, None] * width + xs[None, :], total, mask=inside)


def _tile(height: int, width: int) -> tuple[int, int]:
    """A tile of 1,024 numbers at most, as wide as the rows allow."""
    across = min(64, triton.next_power_of_2(width))
    return min(1024 // across, triton.next_power_of_2(height)), across


def blur(x: Tensor, kernel_y: Tensor, kernel_x: Tensor, adjoint: bool) -> Tensor:
    """The blur of x (N, C, H, W), or its adjoint: in one pass, or with many taps in one for each axis."""
    x = x.contiguous()
    ky, kx = (kernel.to(x.device, torch.float32).contiguous() for kernel in (kernel_y, kernel_x))
    height, width = x.shape[2:]
    tile_y, tile_x = _tile(height, width)
    grid = (x.shape[0] * x.shape[1] * triton.cdiv(height, tile_y) * triton.cdiv(width, tile_x),)
    one = torch.ones(1, device=x.device)
    passes = [(ky, kx)] if len(ky) * len(kx) <= _DIRECT else [(ky, one), (one, kx)]
    source = x
    for number, (along_y, along_x) in enumerate(passes, 1):
        out = torch.empty_like(x, dtype=x.dtype if number == len(passes) else torch.float32)
        if x.numel():
            with torch.cuda.device_of(x):
                _blur[grid](
                    source,
                    out,
                    along_y,
                    along_x,
                    height,
                    width,
                    TAPS_Y=len(along_y),
                    TAPS_X=len(along_x),
                    ADJOINT=adjoint,
                    TILE_Y=tile_y,
                    TILE_X=tile_x,
                )
        source = out
    return source


@triton.jit
def _between(at, old, new):
    """Where pixel `at` of `new` lies among `old`: the pixel before, the one after, the weight of the latter.

    The place (at + 1/2) · old / new - 1/2, not below 0, in whole numbers: exact at any size below 2^15.
    """
    place = tl.maximum((2 * at + 1) * old - new, 0)
    before = tl.minimum(place // (2 * new), old - 1)
    weight = (place % (2 * new)).to(tl.float32) / (2.0 * new)
    return before, tl.minimum(before + 1, old - 1), weight


@triton.jit
def _resize(
    x, out, top, left, channels, height, width, size, out_h, out_w, fill,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """One tile of one canvas."""
    across = tl.cdiv(out_w, TILE_X)
    tiles = across * tl.cdiv(out_h, TILE_Y)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    ys = tile // across * TILE_Y + tl.arange(0, TILE_Y)
    xs = tile % across * TILE_X + tl.arange(0, TILE_X)
    iy = ys - tl.load(top + plane // channels).to(tl.int32)
    ix = xs - tl.load(left + plane // channels).to(tl.int32)
    canvas = (ys < out_h)[:, None] & (xs < out_w)[None, :]
    inside = ((iy >= 0) & (iy < size))[:, None] & ((ix >= 0) & (ix < size))[None, :] & canvas
    y0, y1, wy = _between(tl.minimum(tl.maximum(iy, 0), size - 1), height, size)
    x0, x1, wx = _between(tl.minimum(tl.maximum(ix, 0), size - 1), width, size)
    source = x + plane.to(tl.int64) * height * width
    a = tl.load(source + y0[:, None] * width + x0[None, :], mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + y0[:, None] * width + x1[None, :], mask=inside, other=0.0).to(tl.float32)
    c = tl.load(source + y1[:, None] * width + x0[None, :], mask=inside, other=0.0).to(tl.float32)
    d = tl.load(source + y1[:, None] * width + x1[None, :], mask=inside, other=0.0).to(tl.float32)
    upper = (1 - wx)[None, :] * a + wx[None, :] * b
    lower = (1 - wx)[None, :] * c + wx[None, :] * d
    value = tl.where(inside, (1 - wy)[:, None] * upper + wy[:, None] * lower, fill)
    target = out + plane.to(tl.int64) * out_h * out_w + ys[:, None] * out_w + xs[None, :]
    tl.store(target, value, mask=canvas)


@triton.jit
def _share(at, pixel, old, new):
    """The weight of pixel `pixel` of `old` in pixel `at` of `new`."""
    before, after, weight = _between(at, old, new)
    share = tl.where(before == pixel, 1 - weight, 0.0) + tl.where(after == pixel, weight, 0.0)
    return tl.where(at < new, share, 0.0)


@triton.jit
def _resize_adjoint(
    gradient, out, top, left, channels, height, width, size, out_h, out_w, taps_y, taps_x,
    TILE_Y: tl.constexpr, TILE_X: tl.constexpr,
):  # fmt: skip
    """One tile of one image's gradient: each pixel gathers from the `taps` resized ones that may have used it."""
    across = tl.cdiv(width, TILE_X)
    tiles = across * tl.cdiv(height, TILE_Y)
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    ys = tile // across * TILE_Y + tl.arange(0, TILE_Y)
    xs = tile % across * TILE_X + tl.arange(0, TILE_X)
    down = tl.load(top + plane // channels).to(tl.int32)
    right = tl.load(left + plane // channels).to(tl.int32)
    first_y = tl.maximum(size * (2 * ys - 1) - height, 0) // (2 * height)
    first_x = tl.maximum(size * (2 * xs - 1) - width, 0) // (2 * width)
    base = gradient + plane.to(tl.int64) * out_h * out_w
    total = tl.zeros((TILE_Y, TILE_X), tl.float32)
    for i in range(taps_y):
        iy = first_y + i
        wy = _share(iy, ys, height, size)
        cy = iy + down
        valid_y = (wy > 0) & (cy >= 0) & (cy < out_h) & (ys < height)
        for j in range(taps_x):
            ix = first_x + j
            wx = _share(ix, xs, width, size)
            cx = ix + right
            valid_x = (wx > 0) & (cx >= 0) & (cx < out_w) & (xs < width)
            mask = valid_y[:, None] & valid_x[None, :]
            value = tl.load(base + cy[:, None] * out_w + cx[None, :], mask=mask, other=0.0).to(tl.float32)
            total += wy[:, None] * wx[None, :] * value
    inside = (ys < height)[:, None] & (xs < width)[None, :]
    target = out + plane.to(tl.int64) * height * width + ys[:, None] * width + xs[None, :]
    tl.store(target, total, mask=inside)


def resize(
    x: Tensor, size: int, top: Tensor, left: Tensor, old: tuple[int, int], new: tuple[int, int], value: float
) -> Tensor:
    """`robust.cuda_ops.resize_pad` of x (N, C, *old); top and left (N,)."""
    out = x.new_empty(*x.shape[:2], *new)
    tile_y, tile_x = _tile(*new)
    grid = (x.shape[0] * x.shape[1] * triton.cdiv(new[0], tile_y) * triton.cdiv(new[1], tile_x),)
    if out.numel():
        with torch.cuda.device_of(x):
            _resize[grid](
                x.contiguous(),
                out,
                top.contiguous(),
                left.contiguous(),
                x.shape[1],
                *old,
                size,
                *new,
                value,
                TILE_Y=tile_y,
                TILE_X=tile_x,
            )
    return out


def resize_adjoint(
    gradient: Tensor, size: int, top: Tensor, left: Tensor, old: tuple[int, int], new: tuple[int, int]
) -> Tensor:
    """The gradient (N, C, *old) of `resize` from that of its canvas (N, C, *new)."""
    out = gradient.new_empty(*gradient.shape[:2], *old)
    tile_y, tile_x = _tile(*old)
    grid = (out.shape[0] * out.shape[1] * triton.cdiv(old[0], tile_y) * triton.cdiv(old[1], tile_x),)
    if out.numel():
        with torch.cuda.device_of(gradient):
            _resize_adjoint[grid](
                gradient.contiguous(),
                out,
                top.contiguous(),
                left.contiguous(),
                out.shape[1],
                *old,
                size,
                *new,
                2 * size // old[0] + 3,
                2 * size // old[1] + 3,
                TILE_Y=tile_y,
                TILE_X=tile_x,
            )
    return out
