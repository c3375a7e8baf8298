"""PSNR and SSIM are what their papers say, and recovered images find their originals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robust.errors import DataError
from robust.metrics import get
from robust.similarity import matched, psnr, ssim


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def slow_ssim(a: np.ndarray, b: np.ndarray, width: float) -> float:
    """One channel by the paper's formula: window by window, as scikit-image does it with Gaussian weights.

    That is `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`, whose mean leaves
    out the border of five pixels, where windows would not lie inside the image.
    """
    size = min(11, *(side - 1 + side % 2 for side in a.shape))
    radius = size // 2
    weight = np.array(
        [
            [math.exp(-(i * i + j * j) / (2 * 1.5**2)) for j in range(-radius, radius + 1)]
            for i in range(-radius, radius + 1)
        ]
    )
    weight /= weight.sum()
    c1, c2 = (0.01 * width) ** 2, (0.03 * width) ** 2
    found = []
    for i in range(a.shape[0] - size + 1):
        for j in range(a.shape[1] - size + 1):
            p, q = a[i : i + size, j : j + size], b[i : i + size, j : j + size]
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            c = (weight * (p - mp) * (q - mq)).sum()
            found.append((2 * mp * mq + c1) * (2 * c + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    return float(np.mean(found))


def test_psnr_of_a_constant_difference_is_its_level_in_decibels() -> None:
    x = images(2, 3, 8, 8).double() * 0.5
    apart = torch.tensor([0.1, 0.01], dtype=torch.float64)
    assert psnr(x + apart[:, None, None, None], x).tolist() == pytest.approx([20, 40])
    assert psnr(2 * x + 0.2, 2 * x, width=2.0).tolist() == pytest.approx([20, 20])
    assert psnr(x, x).tolist() == [math.inf, math.inf]


@pytest.mark.parametrize(("side", "width"), [((16, 13), 1.0), ((8, 8), 1.0), ((12, 11), 255.0)])
def test_ssim_is_the_papers_formula_window_by_window(side: tuple[int, int], width: float) -> None:
    x, other = images(2, 2, *side) * width, images(2, 2, *side, seed=1) * width
    near = 0.7 * x + 0.3 * other
    wanted = [
        np.mean([slow_ssim(near[n, c].double().numpy(), x[n, c].double().numpy(), width) for c in range(2)])
        for n in range(2)
    ]
    assert ssim(near, x, width).tolist() == pytest.approx(wanted, abs=1e-9)


def test_ssim_is_one_for_equal_images_only_and_low_for_others() -> None:
    x = images(1, 3, 16, 16)
    assert float(ssim(x, x)) == pytest.approx(1)
    assert float(ssim(1 - x, x)) < 0
    assert float(ssim((x + 0.05).clamp(0, 1), x)) > float(ssim(images(1, 3, 16, 16, seed=2), x))


def test_recovered_images_find_their_originals_whatever_their_order_is() -> None:
    x = images(6, 1, 8, 8)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    recovered = x[order] + 0.05 * images(6, 1, 8, 8, seed=3)
    assert torch.equal(order[matched(recovered, x)], torch.arange(6))


def test_metrics_are_in_the_registry_and_refuse_what_differs_in_shape() -> None:
    assert (get("psnr"), get("ssim")) == (psnr, ssim)
    for metric in (psnr, ssim, matched):
        with pytest.raises(DataError, match="cannot be compared; give one shape"):
            metric(images(2, 1, 8, 8), images(2, 1, 8, 9))
