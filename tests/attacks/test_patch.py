"""The patch: exact geometry, its gradient, closed forms on linear models, printing and photographs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robust.attacks.patch.attack import AdversarialPatch
from robust.attacks.patch.placement import (
    Placements,
    Ranges,
    extents,
    full_size,
    patch_threat,
    placed,
    shape_mask,
    upright,
)
from robust.attacks.patch.trained import TrainedPatch, weathered
from robust.classifier import Classifier
from robust.errors import DataError, RobustError, ThreatError
from robust.rng import Draws, derive
from robust.threat import Patch
from tests.contracts.subjects import small


def draws(count: int, stream: str = "test") -> Draws:
    """A keyed source for so many rows."""
    return Draws(3, stream, torch.arange(count))


def where(angle: float, scale: float, down: float, across: float) -> Placements:
    """One placement."""
    return Placements(*(torch.tensor([value]) for value in (angle, scale, down, across)))


def patch(height: int = 4, width: int = 6, shape: str = "rectangle", **fields: object) -> TrainedPatch:
    """A patch of noise for images of 32 × 32."""
    torch.manual_seed(1)
    levels = (torch.rand(3, height, width) * 255).round() / 255
    return TrainedPatch(levels, shape_mask(shape, height, width), (32, 32), (0.0, 1.0), Ranges(), **fields)  # type: ignore[arg-type]


def test_an_upright_patch_on_whole_pixels_is_its_texture_bit_for_bit_and_changes_nothing_else() -> None:
    x, texture = torch.rand(50, 3, 32, 20), patch().texture
    found = upright(draws(50), (32, 20), (4, 6))
    out = placed(x, texture, torch.ones(4, 6), found)
    corners = torch.stack([found.down - 1.5, found.across - 2.5], 1).long()
    for image, clean, (top, left) in zip(out, x, corners.tolist(), strict=True):
        assert torch.allclose(image[:, top : top + 4, left : left + 6], texture, atol=2e-5, rtol=0)
        untouched = torch.ones(32, 20, dtype=torch.bool)
        untouched[top : top + 4, left : left + 6] = False
        assert torch.equal(image[:, untouched], clean[:, untouched])
    assert corners[:, 0].min() == 0
    assert corners[:, 0].max() == 28
    assert corners[:, 1].unique().numel() > 10


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_right_angle_turns_the_patch_clockwise(turns: int) -> None:
    texture = patch(5, 5).texture
    out = placed(torch.zeros(1, 3, 9, 9), texture, torch.ones(5, 5), where(90.0 * turns, 1.0, 4.0, 4.0))
    assert torch.allclose(out[0, :, 2:7, 2:7], texture.rot90(-turns, (1, 2)), atol=1e-4)
    assert float(out.sum()) == pytest.approx(float(texture.sum()), rel=1e-3)


def test_a_placed_patch_covers_its_scaled_area_wholly_inside_the_image() -> None:
    found = Ranges(180.0, 0.5, 1.5).draw(draws(200), (32, 32), (8, 10))
    white = placed(torch.zeros(200, 1, 32, 32), torch.ones(1, 8, 10), torch.ones(8, 10), found)
    area = white.sum((1, 2, 3))
    ratio = area / (80 * found.scale.square())
    assert float(ratio.mean()) == pytest.approx(1, abs=0.01)
    assert torch.allclose(ratio, torch.ones(200), atol=0.2), "pixels on its edge are covered in part"
    assert float(found.scale.min()) < 0.55
    assert float(found.scale.max()) > 1.45
    assert float(found.angle.min()) < -150
    half = extents(found.angle, found.scale, (8, 10)) / 2
    centre = torch.stack([found.down, found.across], 1) + 0.5
    assert bool(((centre - half) > -1e-3).all() & ((centre + half) < 32 + 1e-3).all())


def test_a_patch_larger_than_the_image_lies_in_its_middle() -> None:
    found = Ranges(0.0, 3.0, 3.0).draw(draws(5), (32, 32), (20, 5))
    assert found.down.tolist() == [15.5] * 5
    assert found.across.unique().numel() > 1


def test_the_placement_s_gradient_is_the_difference_quotient() -> None:
    x = torch.rand(4, 2, 12, 12, dtype=torch.float64)
    found = Ranges(40.0, 0.8, 1.2).draw(draws(4), (12, 12), (4, 5))
    texture = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = shape_mask("round", 4, 5)
    assert torch.autograd.gradcheck(lambda part: placed(x, part, mask, found), texture)


def test_an_image_s_place_is_its_own_in_any_batch() -> None:
    x, one = torch.rand(6, 3, 32, 32), patch(brightness=0.1, noise=0.05)
    index = torch.tensor([5, 0, 9, 2, 7, 1])
    together = one.apply(x, seed=4, index=index, printing=True)
    for i in range(6):
        alone = one.apply(x[i : i + 1], seed=4, index=index[i : i + 1], printing=True)
        assert torch.allclose(alone[0], together[i], atol=1e-6)
    assert not torch.equal(together, one.apply(x, seed=5, index=index, printing=True))
    assert not torch.equal(together, one.apply(x, seed=4, index=index))


def test_a_round_patch_is_a_disc() -> None:
    mask = shape_mask("round", 41, 41)
    assert float(mask.mean()) == pytest.approx(torch.pi / 4, abs=0.01)
    assert torch.equal(mask, mask.rot90())
    out = patch(9, 9, "round").at(torch.zeros(1, 3, 32, 32), where(0.0, 1.0, 16.0, 16.0))
    assert float(out[0, :, 12, 12].abs().sum()) == 0, "the corner stays as it is"
    assert float(out[0, :, 12, 16].abs().sum()) > 0


@pytest.mark.parametrize(("shape", "side"), [("rectangle", 10), ("round", 11)])
def test_a_tenth_of_a_cifar_image_is_at_most_a_tenth(shape: str, side: int) -> None:
    threat = patch_threat(0.1, 32, 32, shape)
    assert (threat.height, threat.width) == (side, side)
    assert 0.09 < float(shape_mask(shape, side, side).sum()) / 1024 <= 0.1


@pytest.mark.parametrize("shape", ["rectangle", "round"])
def test_a_patch_of_a_share_covers_that_share_and_its_scaled_area_on_average(shape: str) -> None:
    clf, x, y = small(n=8)
    attack = AdversarialPatch.sized(0.3, *x.shape[2:], shape=shape, steps=2, resolution=3)
    found = attack.fit(clf, x, y)
    assert found.area == pytest.approx(0.3, rel=1e-6)
    assert min(found.size) > min(attack.threat.height, attack.threat.width), "whole pixels are less"  # type: ignore[attr-defined]
    white = replace(found, texture=torch.ones(1, *found.texture.shape[1:]), image=(32, 32))
    cover = white.apply(torch.zeros(400, 1, 32, 32), scale=1.2).sum((1, 2, 3))
    assert float(cover.mean()) == pytest.approx(1.2**2 * 0.3 * x.shape[2] * x.shape[3], rel=0.01)


def test_a_patch_of_a_share_is_never_larger_than_the_image() -> None:
    assert full_size(1.0, shape_mask("round", 8, 8), (8, 8), (8, 10)) == (8.0, 8.0)
    with pytest.raises(RobustError, match="share"):
        full_size(1.1, torch.ones(2, 2), (2, 2), (8, 8))


class Lured(nn.Module):
    """Red raises class 1, but never above class 0; blue raises class 2 above, where there is little red."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 0.6]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3) of the sums of two channels; a plain black image is class 0."""
        red, blue = x.sum((2, 3))[:, ::2].unbind(1)
        first = 5.9 - self.weight[0] * (8 - red).relu()
        return torch.stack([torch.full_like(red, 6.0), first, 3 + self.weight[1] * (blue / 2 - red)], 1)


def test_scouts_find_the_class_that_leading_away_from_the_true_one_runs_past() -> None:
    clf, x = Classifier(Lured().eval()), torch.zeros(20, 3, 16, 16)
    y = torch.zeros(20, dtype=torch.long)
    fields = {"rotation": 0.0, "min_scale": 1.0, "max_scale": 1.0, "brightness": 0.0, "noise": 0.0}
    attack = AdversarialPatch(
        threat=Patch(height=4, width=4), steps=160, batch=5, step_size=0.1, scouting=0.5, **fields
    )  # type: ignore[arg-type]
    found = attack.fit(clf, x, y)
    assert (found.target, found.towards) == (None, 2)
    assert bool((clf.logits(found.apply(x)).argmax(1) == 2).all())
    assert found.cost["backwards"] <= 160 * 5, "scouts take their steps from the whole"
    alone = replace(attack, scouting=0.0).fit(clf, x, y)
    assert alone.towards is None
    assert bool((clf.logits(alone.apply(x)).argmax(1) == 0).all()), "red is as far as it gets"


class Tinted(nn.Module):
    """Scores that depend on the sums of the channels only, wherever they come from."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.0, 0.0, 0.0], [0.02, -0.03, 0.01], [-0.01, 0.01, -0.03]]))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 3), shifted so that plain images are class 0."""
        return x.sum((2, 3)) @ self.weight.T + torch.tensor([6.0, 0.0, 0.0])


def test_towards_a_class_the_patch_takes_the_colour_that_the_weights_say() -> None:
    clf, x = Classifier(Tinted().eval()), torch.rand(20, 3, 16, 16)
    y = torch.zeros(20, dtype=torch.long)
    attack = AdversarialPatch(
        threat=Patch(height=4, width=4), steps=120, step_size=0.1, brightness=0.0, noise=0.0
    )
    found = attack.fit(clf, x, y, targets=1)
    assert found.target == 1
    # The gradient in every texel has the sign of w_1 − w_0 weighted by p_0, and of w_1 − w_2 by p_2: here they agree.
    best = torch.tensor([1.0, 0.0, 1.0])[:, None, None].expand(3, 8, 8)
    assert torch.allclose(found.texture, best, atol=0.02)
    assert torch.equal((found.texture * 255).round() / 255, found.texture), "on 256 levels, as it is printed"


@pytest.mark.parametrize("scouting", [0.0, 0.5])
def test_towards_a_class_the_ascent_starts_at_the_picture_that_leads_there_best(scouting: float) -> None:
    clf, x = Classifier(Tinted().eval()), torch.full((30, 3, 16, 16), 0.5)
    x[20], x[21] = torch.tensor([0.7, 0.2, 0.5])[:, None, None], torch.tensor([0.9, 0.1, 0.8])[:, None, None]
    y = torch.zeros(30, dtype=torch.long)
    y[20:22] = 1
    fields = {"brightness": 0.0, "noise": 0.0, "step_size": 1e-9, "steps": 40, "scouting": scouting}
    attack = AdversarialPatch(threat=Patch(height=4, width=4), **fields)  # type: ignore[arg-type]
    found = attack.fit(clf, x, y, targets=1 if not scouting else None)
    assert (found.target, found.towards) == ((1, None) if not scouting else (None, 1))
    assert torch.allclose(found.texture, x[21, :, :8, :8], atol=0.5 / 255 + 1e-6)
    noise = replace(attack, start="noise").fit(clf, x, y, targets=1)
    without = attack.fit(clf, x[:20], y[:20], targets=1)
    assert torch.equal(noise.texture, without.texture), "a class without samples starts at noise"
    assert float(noise.texture.std()) > 0.2


def rate(found: TrainedPatch, clf: Classifier, x: Tensor, y: Tensor, target: int | None) -> float:
    """The share of samples that the patch leads away, or to the target, over the three places that the search asks."""
    index, hits = torch.arange(len(x)), 0
    for place in range(3):
        seen = clf(found.apply(x, seed=derive(0, "patch/scout", place), index=index)).argmax(1)
        hits += int((seen != y if target is None else seen == target).sum())
    return hits / (3 * len(x))


@pytest.mark.parametrize("target", [None, 1])
@pytest.mark.parametrize("start", ["picture", "noise"])
def test_of_its_restarts_the_patch_that_fools_most_is_kept(start: str, target: int | None) -> None:
    clf, x, y = small(n=60)
    if target is not None and start == "noise":
        x, y = x[y != target], y[y != target]
    attack = AdversarialPatch(
        threat=Patch(height=3, width=3),
        steps=12,
        batch=20,
        scouting=0.5,
        start=start,
        brightness=0.0,
        noise=0.0,
    )  # type: ignore[arg-type]
    rates = []
    for restarts in range(1, 7):
        found = replace(attack, restarts=restarts).fit(clf, x, y, targets=target, precision="float32")
        rates.append(rate(found, clf, x, y, target))
    assert rates == sorted(rates), "a further ascent loses nothing"
    assert rates[-1] > rates[0], "and in the end finds more"


def test_run_lies_within_its_threat_and_fit_fools_images_it_has_not_seen() -> None:
    clf, x, y = small(n=120)
    attack = AdversarialPatch(threat=Patch(height=4, width=4), steps=150, batch=20, rotation=10.0)
    found = attack.fit(clf, x[:60], y[:60], seed=1)
    assert found.cost["backwards"] == 150 * 20
    assert found.history[-1]["step"] == 150
    assert found.history[-1]["fooled"] > found.history[0]["fooled"]
    fooled = clf.logits(found.apply(x[60:])).argmax(1) != y[60:]
    noise = clf.logits(found.control().apply(x[60:])).argmax(1) != y[60:]
    assert float(fooled.float().mean()) > float(noise.float().mean()) + 0.2
    result = attack.run(clf, x[:12], y[:12])
    assert 0 < float(result.distance.max()) <= 1


def test_any_mask_gives_the_patch_its_shape() -> None:
    clf, x, y = small(n=20)
    mask = torch.zeros(4, 5)
    mask[1:3] = 1
    attack = AdversarialPatch(
        threat=Patch(height=4, width=5), steps=10, rotation=0.0, min_scale=1.0, max_scale=1.0
    )
    found = attack.fit(clf, x, y, mask=mask)
    changed = (found.at(x[:1], where(0.0, 1.0, 2.5, 3.0)) != x[:1])[0, 0]
    assert changed.any(1).nonzero()[:, 0].tolist() == [2, 3], "two rows, though the rectangle has four"
    assert found.area == pytest.approx(10 / 42)
    for wrong in (torch.ones(3, 3), torch.zeros(4, 5), 2 * torch.ones(4, 5)):
        with pytest.raises(DataError, match="mask"):
            attack.fit(clf, x, y, mask=wrong)


@pytest.mark.parametrize(("width_mm", "dpi"), [(100.0, 300.0), (25.4, 150.0), (60.0, 96.0)])
def test_a_print_has_the_dots_that_its_size_takes_and_says_so(
    tmp_path: Path, width_mm: float, dpi: float
) -> None:
    one = patch(4, 6)
    dots = one.save_png(tmp_path / "patch.png", width_mm=width_mm, dpi=dpi)
    with Image.open(tmp_path / "patch.png") as picture:
        assert (
            picture.size
            == (dots[1], dots[0])
            == (
                round(width_mm / 25.4 * dpi),
                round(width_mm * 4 / 6 / 25.4 * dpi),
            )
        )
        stored = picture.info["dpi"]
        assert stored == pytest.approx((dpi, dpi), rel=1e-3)
        assert picture.size[0] / stored[0] * 25.4 == pytest.approx(width_mm, abs=25.4 / dpi)


def test_a_print_shows_the_patch_that_was_measured_and_leaves_the_rest_white(tmp_path: Path) -> None:
    one = patch(5, 5, "round")
    one.save_png(tmp_path / "blocks.png", width_mm=50.8, dpi=125, smooth=False)
    with Image.open(tmp_path / "blocks.png") as picture:
        centres = [picture.getpixel((25 + 50 * c, 25 + 50 * r)) for r in range(5) for c in range(5)]
    expected = [
        tuple((one.texture[:, r, c] * 255).round().int().tolist()) for r in range(5) for c in range(5)
    ]
    for texel, want, covered in zip(centres, expected, one.mask.flatten().tolist(), strict=True):
        assert texel == (want if covered else (255, 255, 255))


@pytest.mark.parametrize(("width_mm", "dpi"), [(0.0, 300.0), (100.0, -1.0), (1e6, 300.0)])
def test_an_impossible_print_is_one_line(tmp_path: Path, width_mm: float, dpi: float) -> None:
    with pytest.raises(RobustError, match="mm"):
        patch().save_png(tmp_path / "x.png", width_mm=width_mm, dpi=dpi)
    assert not list(tmp_path.iterdir())


def test_a_patch_is_stored_whole(tmp_path: Path) -> None:
    one = patch(brightness=0.2, noise=0.1, target=3, history=[{"step": 1.0}], sides=(4.2, 6.3))
    one.save(tmp_path / "patch.safetensors")
    two = TrainedPatch.load(tmp_path / "patch.safetensors")
    x = torch.rand(3, 3, 32, 32)
    assert torch.equal(one.apply(x, printing=True), two.apply(x, printing=True))
    assert (two.target, two.ranges, two.history, two.image) == (3, one.ranges, one.history, (32, 32))
    (tmp_path / "other").write_text("no such thing")
    with pytest.raises(RobustError, match="holds no patch"):
        TrainedPatch.load(tmp_path / "other")


def test_in_a_photograph_the_patch_has_its_share_of_the_shorter_side() -> None:
    one = patch(8, 8)
    photo = torch.zeros(3, 320, 500)
    white = TrainedPatch(torch.ones(3, 8, 8), one.mask, (32, 32), (0.0, 1.0), one.ranges)
    shown = white.place(photo, at=(0.5, 0.25))
    assert shown.shape == photo.shape
    assert float(shown[0].sum()) == pytest.approx(80 * 80, rel=0.02)
    rows, columns = shown[0].nonzero().double().mean(0).tolist()
    assert (rows, columns) == (pytest.approx(159.5, abs=1), pytest.approx(124.5, abs=1))
    assert float(white.place(photo, scale=0.5)[0].sum()) == pytest.approx(40 * 40, rel=0.03)
    small_photo = torch.rand(3, 32, 32)
    same = one.at(small_photo[None], where(30.0, 1.1, 15.5, 15.5))[0]
    assert torch.allclose(one.place(small_photo, scale=1.1, angle=30.0), same, atol=1e-6)


def test_what_cannot_be_is_one_line() -> None:
    clf, x, y = small(n=4)
    with pytest.raises(ThreatError, match="does not fit"):
        AdversarialPatch(threat=Patch(height=9, width=3)).run(clf, x, y)
    for fields in (
        {"rotation": 181.0},
        {"min_scale": 2.0},
        {"noise": -1.0},
        {"steps": 0},
        {"scouting": 1.0},
        {"restarts": 0},
        {"shape": "star"},
        {"start": "middle"},
    ):
        with pytest.raises(RobustError):
            AdversarialPatch(threat=Patch(height=3, width=3), **fields).run(clf, x, y)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="photograph"):
        patch().place(torch.rand(1, 9, 9))
    with pytest.raises(DataError, match="fits images"):
        patch().apply(torch.rand(2, 1, 32, 32))
    with pytest.raises(RobustError, match="share"):
        patch_threat(0.0, 32, 32)
    with pytest.raises(RobustError, match="no sample"):
        AdversarialPatch(threat=Patch(height=3, width=3)).fit(clf, x[:0], y[:0])


@pytest.mark.parametrize("brightness", [0.0, 0.2])
def test_a_texel_at_the_boxs_edge_keeps_its_gradient(brightness: float) -> None:
    texture = torch.tensor([0.0, 1.0, 0.5, 1.0]).view(1, 2, 2).requires_grad_(True)
    draws = Draws(0, "test", torch.arange(400))
    worn = weathered(texture, draws, brightness, 0.0, (0.0, 1.0))
    (gradient,) = torch.autograd.grad(worn.mean(0).sum(), texture)
    assert worn.min() >= 0
    assert worn.max() <= 1
    inside = 1.0 if brightness == 0 else 0.5  # light lifts half of the draws over the edge
    assert gradient.flatten().tolist() == pytest.approx([inside, inside, 1.0, inside], abs=0.1)
