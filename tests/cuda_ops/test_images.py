"""Blur and resize-pad against torch's and torchvision's own, in values and in gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2.functional import gaussian_blur

from robust.cuda_ops import resize_pad, separable_blur


def images(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform pictures that are always the same."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def gaussian(taps: int, sigma: float) -> Tensor:
    """A normalised Gaussian kernel."""
    weights = torch.exp(-((torch.arange(taps) - taps // 2) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("height", "width", "ky", "kx"), [(7, 9, 3, 5), (5, 4, 9, 7), (13, 11, 1, 3), (1, 6, 1, 3)]
)
def test_blur_is_the_correlation_with_the_outer_product(height: int, width: int, ky: int, kx: int) -> None:
    x, along_y, along_x = images(2, 3, height, width), images(ky), images(kx)
    padded = F.pad(x, (kx // 2, kx // 2, ky // 2, ky // 2), mode="reflect")
    kernel = torch.outer(along_y, along_x).expand(3, 1, ky, kx)
    assert torch.allclose(separable_blur(x, along_y, along_x), F.conv2d(padded, kernel, groups=3), rtol=1e-5)


def test_blur_is_torchvision_s_gaussian_blur() -> None:
    x = images(2, 3, 17, 14)
    expected = gaussian_blur(x, [5, 9], [0.8, 2.0])  # sizes and sigmas along x, then y
    assert torch.allclose(separable_blur(x, gaussian(9, 2.0), gaussian(5, 0.8)), expected, atol=1e-6)


def test_blur_keeps_a_constant_and_spreads_a_point_as_the_kernels() -> None:
    flat = separable_blur(torch.full((1, 2, 6, 5), 0.7), gaussian(5, 1.0), gaussian(3, 1.0))
    assert torch.allclose(flat, torch.full_like(flat, 0.7))
    point = torch.zeros(1, 1, 7, 7)
    point[0, 0, 3, 3] = 1
    spread = separable_blur(point, torch.tensor([1.0, 2, 3]), torch.tensor([5.0, 7, 11]))
    expected = torch.outer(torch.tensor([3.0, 2, 1]), torch.tensor([11.0, 7, 5]))
    assert torch.equal(spread[0, 0, 2:5, 2:5], expected)
    assert spread.sum() == expected.sum()


def test_blur_spreads_nan_as_far_as_the_kernel_and_no_farther() -> None:
    x = images(1, 1, 6, 8)
    x[0, 0, 0, 2] = torch.nan
    bad = separable_blur(x, gaussian(3, 1.0), gaussian(5, 1.0)).isnan()[0, 0]
    expected = torch.zeros(6, 8, dtype=torch.bool)
    expected[:2, :5] = True
    assert torch.equal(bad, expected)


def test_blur_keeps_dtypes_and_takes_empty_batches() -> None:
    x = images(2, 1, 5, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        blurred = separable_blur(x.to(dtype), gaussian(3, 1.0), gaussian(3, 1.0))
        exact = separable_blur(x.to(dtype).double(), gaussian(3, 1.0), gaussian(3, 1.0))
        assert blurred.dtype == dtype
        assert torch.allclose(blurred.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-12)
    assert separable_blur(x[:0], gaussian(3, 1.0), gaussian(3, 1.0)).shape == (0, 1, 5, 5)


def test_blur_has_the_gradient_of_every_order() -> None:
    x = images(2, 2, 5, 4, dtype=torch.float64).requires_grad_()
    ky, kx = images(5, dtype=torch.float64), images(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: separable_blur(t, ky, kx), x)
    assert torch.autograd.gradgradcheck(lambda t: separable_blur(t, ky, kx).square(), x)


@pytest.mark.parametrize(
    ("x", "ky", "kx"),
    [
        (images(2, 3, 4), images(3), images(3)),
        (images(2, 3, 4, 4), images(2), images(3)),
        (images(2, 3, 4, 4), images(3), images(9)),
        (images(2, 3, 4, 4), images(3, 1), images(3)),
        (images(2, 3, 4, 4).long(), images(3), images(3)),
    ],
)
def test_blur_refuses_what_it_cannot_mean(x: Tensor, ky: Tensor, kx: Tensor) -> None:
    with pytest.raises(ValueError, match=r"taps|\(N, C, H, W\)"):
        separable_blur(x, ky, kx)


def placed(
    x: Tensor, size: int, top: list[int], left: list[int], canvas: tuple[int, int], value: float
) -> Tensor:
    """The same by torch's interpolation, padding and cropping, row by row; differentiable."""
    resized = F.interpolate(x, (size, size), mode="bilinear", align_corners=False)
    rows = []
    for row, t, l in zip(resized, top, left, strict=True):
        margins = (l, canvas[1] - size - l, t, canvas[0] - size - t)  # negative ones crop
        rows.append(F.pad(row, margins, value=value))
    return torch.stack(rows)


SETTINGS = [
    ((3, 2, 8, 8), 7, [0, 1, 1], [1, 0, 1], (8, 8)),
    ((2, 3, 5, 9), 13, [2, 0], [1, 4], (16, 17)),
    ((2, 1, 11, 4), 1, [0, 3], [2, 0], (4, 3)),
    ((2, 1, 1, 1), 3, [0, 1], [1, 0], (4, 5)),
    ((2, 2, 6, 6), 6, [-2, 3], [4, -1], (6, 7)),
]


@pytest.mark.parametrize(("shape", "size", "top", "left", "canvas"), SETTINGS)
def test_resize_pad_is_interpolation_and_padding(
    shape: tuple[int, ...], size: int, top: list[int], left: list[int], canvas: tuple[int, int]
) -> None:
    x = images(*shape)
    found = resize_pad(x, size, torch.tensor(top), torch.tensor(left), *canvas, value=0.25)
    assert torch.allclose(found, placed(x, size, top, left, canvas, 0.25), atol=1e-6)


@pytest.mark.parametrize(("shape", "size", "top", "left", "canvas"), SETTINGS)
def test_resize_pad_has_the_gradient_of_interpolation_and_padding(
    shape: tuple[int, ...], size: int, top: list[int], left: list[int], canvas: tuple[int, int]
) -> None:
    x = images(*shape, dtype=torch.float64).requires_grad_()
    places = (torch.tensor(top), torch.tensor(left))
    weight = images(*shape[:2], *canvas, dtype=torch.float64)
    (mine,) = torch.autograd.grad((resize_pad(x, size, *places, *canvas, 0.25) * weight).sum(), x)
    (theirs,) = torch.autograd.grad((placed(x, size, top, left, canvas, 0.25) * weight).sum(), x)
    assert torch.allclose(mine, theirs)
    assert torch.autograd.gradcheck(lambda t: resize_pad(t, size, *places, *canvas, 0.25), x)
    assert torch.autograd.gradgradcheck(lambda t: resize_pad(t, size, *places, *canvas, 0.25).pow(3), x)


def test_resize_pad_to_the_same_size_only_moves_and_one_place_serves_all() -> None:
    x = images(3, 2, 5, 5)
    found = resize_pad(x, 5, 2, 1, 9, 8, -1.0)
    assert torch.equal(found[:, :, 2:7, 1:6], x)
    assert torch.equal(found, resize_pad(x, 5, torch.full((3,), 2), torch.full((3,), 1), 9, 8, -1.0))
    found[:, :, 2:7, 1:6] = -1
    assert bool((found == -1).all())
    assert bool((resize_pad(x, 5, 9, 0, 9, 8, 0.5) == 0.5).all()), (
        "an image beyond the canvas is cut off whole"
    )


def test_resize_pad_keeps_dtypes_and_takes_empty_batches() -> None:
    x = images(2, 1, 5, 5)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert resize_pad(x.to(dtype), 4, 0, 1, 6, 6).dtype == dtype
    empty = resize_pad(x[:0], 4, torch.zeros(0).long(), 1, 6, 7)
    assert empty.shape == (0, 1, 6, 7)


@pytest.mark.parametrize(
    "change",
    [{"size": 0}, {"out_h": 0}, {"top": torch.zeros(3).long()}, {"x": images(2, 5, 5)}, {"size": 2**15}],
)
def test_resize_pad_refuses_what_it_cannot_mean(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"x": images(2, 1, 5, 5), "size": 4, "top": 0, "left": 0, "out_h": 5, "out_w": 5}
    resize_pad(**good)
    with pytest.raises(ValueError, match=r"."):
        resize_pad(**(good | change))
