"""How alike two images are: peak signal-to-noise ratio, structural similarity, and which image is which."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.errors import DataError

WINDOW, DEVIATION = 11, 1.5
_K1, _K2 = 0.01, 0.03


def psnr(x: Tensor, reference: Tensor, width: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of images in decibels: 10 log10(width² / mean squared difference).

    Args:
        x, reference: (N, C, H, W) of one shape. width: of the box that both live in.

    Returns:
        (N,) float64; infinite where they are equal.
    """
    _require_alike(x, reference)
    squares = (x.double() - reference.double()).square().flatten(1).mean(1)
    return 10 * (width**2 / squares).log10()


def ssim(x: Tensor, reference: Tensor, width: float = 1.0) -> Tensor:
    """Structural similarity of images (Wang et al. 2004, DOI 10.1109/TIP.2003.819861), at most 1.

    Means, variances and covariance are weighted by a Gaussian of deviation 1.5 in windows of 11x11 that lie inside the
    image (in the largest odd window that does, where a side is shorter), K1 = 0.01 and K2 = 0.03; averaged over windows
    and channels.

    Args:
        x, reference: (N, C, H, W) of one shape. width: of the box that both live in.

    Returns:
        (N,) float64.
    """
    _require_alike(x, reference)
    a, b = x.double(), reference.double()
    size = min(WINDOW, *(side - 1 + side % 2 for side in a.shape[2:]))
    places = torch.arange(size, dtype=torch.float64, device=a.device) - size // 2
    line = (-(places**2) / (2 * DEVIATION**2)).exp()
    line = line / line.sum()
    kernel = (line[:, None] * line[None])[None, None]

    def smooth(image: Tensor) -> Tensor:
        smoothed: Tensor = F.conv2d(image.flatten(0, 1)[:, None], kernel).unflatten(0, image.shape[:2])
        return smoothed[:, :, 0]

    mean_a, mean_b = smooth(a), smooth(b)
    variance_a, variance_b = smooth(a * a) - mean_a**2, smooth(b * b) - mean_b**2
    covariance = smooth(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * width) ** 2, (_K2 * width) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).flatten(1).mean(1)


def matched(x: Tensor, reference: Tensor) -> Tensor:
    """(N,) which row of x belongs to each row of the reference: the assignment of the smallest squared distance.

    Args:
        x, reference: (N, …) of one shape.
    """
    from scipy.optimize import linear_sum_assignment

    _require_alike(x, reference)
    flat, wanted = x.double().flatten(1), reference.double().flatten(1)
    costs = torch.cdist(wanted, flat, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.from_numpy(linear_sum_assignment(costs.cpu().numpy())[1])


def _require_alike(x: Tensor, reference: Tensor) -> None:
    if x.shape != reference.shape or x.dim() < 2 or not math.prod(x.shape):
        raise DataError(
            f"images {tuple(x.shape)} and {tuple(reference.shape)} cannot be compared; give one shape"
        )
