"""The transforms against closed forms and independent implementations."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robust.defenses import get
from robust.defenses.transforms.tvmin import minimise
from robust.errors import RobustError

UNIT = (0.0, 1.0)


def images(*shape: int, seed: int = 0) -> Tensor:
    """Smooth random images in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(shape[0], shape[1], 5, 5, generator=generator)
    fine = torch.rand(*shape, generator=generator)
    return (0.8 * F.interpolate(coarse, shape[2:], mode="bilinear") + 0.2 * fine).clamp(0, 1)


def apply(name: str, x: Tensor, key: int = 0, **fields: float) -> Tensor:
    """A transform of images in the unit box."""
    found: Tensor = get(name)(**fields).transform(x, UNIT, key)
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_local_mean_is_the_mean_of_the_square(size: int) -> None:
    x = images(2, 3, 9, 11)
    inner = apply("mean-smooth", x, size=size)
    before, after = size // 2, (size - 1) // 2
    expected = F.avg_pool2d(x, size, 1)
    assert torch.allclose(inner[:, :, before : 9 - after, before : 11 - after], expected, atol=1e-6)
    assert torch.allclose(apply("mean-smooth", torch.full((1, 1, 6, 6), 0.3), size=size), torch.tensor(0.3))


def test_the_gaussian_has_its_deviation_and_keeps_the_mean() -> None:
    point = torch.zeros(1, 1, 21, 21)
    point[0, 0, 10, 10] = 1
    spread = apply("gaussian-smooth", point, sigma=1.5)[0, 0]
    place = torch.arange(21) - 10.0
    assert float(spread.sum()) == pytest.approx(1, abs=1e-6)
    assert float((spread.sum(0) * place**2).sum()) == pytest.approx(1.5**2, rel=0.03)
    assert torch.allclose(spread, spread.T)


@pytest.mark.parametrize("size", [3, 5])
def test_the_median_is_scipy_s(size: int) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    x = images(2, 3, 9, 11)
    expected = ndimage.median_filter(x.numpy(), size=(1, 1, size, size), mode="mirror")
    assert np.array_equal(apply("median-smooth", x, size=size).numpy(), expected)


def test_the_median_removes_a_single_wrong_pixel() -> None:
    x = torch.full((1, 1, 7, 7), 0.5)
    x[0, 0, 3, 3] = 1
    assert torch.equal(apply("median-smooth", x), torch.full((1, 1, 7, 7), 0.5))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_bit_depth_leaves_two_to_the_bits_levels_and_moves_by_half_a_step(bits: int) -> None:
    x = torch.linspace(0, 1, 4001).view(1, 1, 1, -1)
    reduced = apply("bit-depth", x, bits=bits)
    assert len(reduced.unique()) == 2**bits
    assert float((reduced - x).abs().max()) <= 0.5 / (2**bits - 1) + 1e-6
    assert torch.allclose(apply("bit-depth", reduced, bits=bits), reduced)


def pillow(x: Tensor, quality: int) -> Tensor:
    """What Pillow (libjpeg) makes of images (N, C, H, W) in [0, 1], as a viewer sees it."""
    from PIL import Image

    found = []
    for image in x:
        levels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(levels.squeeze()).save(file, "JPEG", quality=quality)
        found.append(torch.from_numpy(np.array(Image.open(file))).view(levels.shape).permute(2, 0, 1))
    return torch.stack(found).float() / 255


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 32, 32), (3, 27, 45), (1, 8, 12)])
def test_jpeg_is_what_libjpeg_decodes(shape: tuple[int, int, int], quality: int) -> None:
    x = images(4, *shape)
    ours, theirs = apply("jpeg", x, quality=quality), pillow(x, quality)
    wrong, lost = (255 * (ours - theirs).abs().mean(), 255 * (x - theirs).abs().mean())
    assert float(wrong) < 1, "less than a level of 255 on average: libjpeg computes in whole numbers"
    assert float(wrong) < 0.35 * float(lost)


def test_jpeg_s_substitute_is_jpeg_without_the_losses_of_rounding() -> None:
    x = images(2, 3, 32, 32)
    fine = get("jpeg")(quality=100)
    assert torch.allclose(fine.substitute(x, UNIT, 0), fine.transform(x, UNIT, 0), atol=0.02)
    grey = x[:, :1]
    assert torch.allclose(fine.substitute(grey, UNIT, 0), grey, atol=1e-5)


def test_a_step_is_flattened_by_total_variation_as_the_closed_form_says() -> None:
    """Rudin-Osher-Fatemi on two half planes: each moves by weight · edge / area towards the other."""
    x = torch.full((1, 1, 6, 8), 0.2)
    x[..., 4:] = 0.9
    weight = 0.1
    z = minimise(x.double(), torch.ones(1, 1, 6, 8).double(), weight, 3000)
    shift = weight * 6 / (6 * 4)
    assert torch.allclose(z[..., :4], torch.tensor(0.2 + shift).double(), atol=1e-4)
    assert torch.allclose(z[..., 4:], torch.tensor(0.9 - shift).double(), atol=1e-4)


def energy(z: Tensor, x: Tensor, kept: Tensor, weight: float) -> float:
    """What `minimise` minimises."""
    down = F.pad(z[:, :, 1:] - z[:, :, :-1], (0, 0, 0, 1))
    right = F.pad(z[..., 1:] - z[..., :-1], (0, 1))
    return float(
        0.5 * (kept * (z - x)).square().sum() + weight * (down.square() + right.square()).sqrt().sum()
    )


def test_tv_min_is_near_the_minimum_after_its_default_steps_and_nothing_beside_it_is_lower() -> None:
    x = images(1, 3, 16, 16).double()
    kept = (torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(1)) > 0.3).double()
    default = get("tv-min")()
    least = energy(minimise(x, kept, default.weight, 4000), x, kept, default.weight)
    found = minimise(x, kept, default.weight, default.steps)
    assert energy(found, x, kept, default.weight) <= 1.01 * least
    best = minimise(x, kept, default.weight, 4000)
    for seed in range(5):
        beside = best + 1e-3 * torch.randn(best.shape, generator=torch.Generator().manual_seed(seed)).double()
        assert energy(beside, x, kept, default.weight) > least


def test_tv_min_does_not_look_at_what_it_drops() -> None:
    x, kept = images(1, 3, 12, 12), (torch.rand(1, 1, 12, 12) > 0.4).float()
    other = torch.where(kept > 0, x, torch.rand_like(x))
    assert torch.equal(minimise(x, kept, 0.01, 20), minimise(other, kept, 0.01, 20))


def test_tv_min_drops_the_declared_share() -> None:
    x = images(40, 1, 16, 16)
    kept = get("tv-min")(drop=0.3).draws(x, 11).uniform(1, 16, 16) >= 0.3
    n = kept.numel()
    assert abs(float(kept.float().mean()) - 0.7) < 4 * math.sqrt(0.21 / n)


@pytest.mark.parametrize("bounds", [UNIT, (-2.0, 2.0)])
def test_noise_has_its_deviation_in_units_of_the_box(bounds: tuple[float, float]) -> None:
    x = torch.zeros(20, 3, 16, 16)
    noise = get("gaussian-noise")(sigma=0.05).transform(x, bounds, 3)
    expected, n = 0.05 * (bounds[1] - bounds[0]), x.numel()
    assert float(noise.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * n))
    assert abs(float(noise.mean())) < 5 * expected / math.sqrt(n)


def test_resized_images_have_every_size_and_place_and_are_black_around() -> None:
    x = torch.ones(600, 1, 10, 10)
    found = apply("resize-pad", x, key=5, smallest=0.8, largest=1.0)
    assert found.shape == x.shape
    inside = found[:, 0] > 0.5
    heights, widths = inside.any(2).sum(1), inside.any(1).sum(1)
    assert torch.equal(heights, widths)
    assert heights.unique().tolist() == [8, 9, 10]
    share = torch.stack([(heights == size).float().mean() for size in (8, 9, 10)])
    assert float((share - 1 / 3).abs().max()) < 4 * math.sqrt(2 / 9 / 600)
    corners = inside[heights == 8].float().flatten(1).argmax(1)
    assert len(corners.unique()) == 9
    assert torch.allclose(found, inside[:, None].float(), atol=1e-6)


def test_a_larger_canvas_enlarges() -> None:
    x = images(5, 3, 10, 10)
    found = apply("resize-pad", x, smallest=1.0, largest=1.2)
    assert found.shape == (5, 3, 12, 12)


def test_a_crop_is_a_window_of_the_enlarged_image() -> None:
    x = images(30, 2, 16, 16)
    found = apply("random-crop", x, key=2, share=0.8)
    large = F.interpolate(x, (20, 20), mode="bilinear")
    windows = large.unfold(2, 16, 1).unfold(3, 16, 1)  # (N, C, 5, 5, 16, 16)
    distance = (windows - found[:, :, None, None]).abs().amax((1, 4, 5)).flatten(1)
    assert float(distance.amin(1).max()) < 1e-6
    assert len(distance.argmin(1).unique()) > 10


@pytest.mark.parametrize(
    ("name", "fields", "shape"),
    [
        ("resize-pad", {}, (1, 3, 8, 9)),
        ("random-crop", {}, (1, 3, 8, 9)),
        ("median-smooth", {"size": 9}, (1, 3, 4, 9)),
        ("mean-smooth", {"size": 9}, (1, 3, 4, 9)),
    ],
)
def test_images_that_do_not_fit_are_one_line(
    name: str, fields: dict[str, float], shape: tuple[int, ...]
) -> None:
    with pytest.raises(RobustError, match=name) as caught:
        apply(name, torch.rand(shape), **fields)
    assert "\n" not in str(caught.value)
