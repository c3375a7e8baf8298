# mypy: disable-error-code="untyped-decorator"
"""Philox4x32-10 (Salmon et al. 2011) inside Triton kernels: the words of `robust.cuda_ops.philox`, bit for bit.

Number e of a row comes from the row's block e // 4; the counter is (block, step, identity low, identity high).
"""

from __future__ import annotations

import triton
import triton.language as tl

_M0 = tl.constexpr(0xD2511F53)
_M1 = tl.constexpr(0xCD9E8D57)
_W0 = tl.constexpr(0x9E3779B9)
_W1 = tl.constexpr(0xBB67AE85)
_UNIT = tl.constexpr(2.0**-24)
_TURN = tl.constexpr(3.7450704e-07)  # 2π · 2^-24 in float32


def signed(key: tuple[int, int]) -> tuple[int, int]:
    """The key's 32-bit words as signed integers: an argument's type in a kernel must not depend on its value."""
    first, second = (word - (word >> 31 << 32) for word in key)
    return first, second


@triton.jit
def words(block: tl.tensor, step: tl.tensor, identity: tl.tensor, k0: tl.tensor, k1: tl.tensor) -> tl.tensor:
    """Four uint32 words for each of `block` (M,) uint32; step and identity are int64 scalars, the key int32."""
    c0 = block.to(tl.uint32)
    c1 = tl.zeros_like(c0) + step.to(tl.uint32)
    c2 = tl.zeros_like(c0) + identity.to(tl.uint32)
    c3 = tl.zeros_like(c0) + (identity >> 32).to(tl.uint32)
    key0 = tl.zeros_like(c0) + k0.to(tl.uint32)
    key1 = tl.zeros_like(c0) + k1.to(tl.uint32)
    first = tl.full(c0.shape, _M0, tl.uint32)
    second = tl.full(c0.shape, _M1, tl.uint32)
    for _ in tl.static_range(10):
        high0 = tl.umulhi(first, c0)
        high1 = tl.umulhi(second, c2)
        low0 = first * c0
        low1 = second * c2
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += tl.full(key0.shape, _W0, tl.uint32)
        key1 += tl.full(key1.shape, _W1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def in_order(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tensor:
    """(M,) of the first, second, third and fourth number of each block -> (4M,) in the order of memory."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def uniform(word: tl.tensor) -> tl.tensor:
    """[0, 1) in float32, from 24 bits of a word."""
    return (word >> 8).to(tl.float32) * _UNIT


@triton.jit
def normals(
    block: tl.tensor, step: tl.tensor, identity: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tl.tensor:
    """(4M,) standard normals of the blocks (M,), by Box and Muller, as `reference.smoothing.fill_normals`."""
    w0, w1, w2, w3 = words(block, step, identity, k0, k1)
    near = tl.sqrt(-2.0 * tl.log(((w0 >> 8) + 1).to(tl.float32) * _UNIT))
    far = tl.sqrt(-2.0 * tl.log(((w2 >> 8) + 1).to(tl.float32) * _UNIT))
    angle = (w1 >> 8).to(tl.float32) * _TURN
    other = (w3 >> 8).to(tl.float32) * _TURN
    return in_order(near * tl.cos(angle), near * tl.sin(angle), far * tl.cos(other), far * tl.sin(other))
