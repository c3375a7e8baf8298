"""What holds for every detector in the registry; a new row is tested here without a new file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust import Classifier, Linf
from robust.attacks import PGD
from robust.attacks import get as attack
from robust.cli.main import run
from robust.defenses import REGISTRY, get
from robust.detector import Detector, Fitted, load_detector
from robust.errors import RobustError
from robust.registry import card

NAMES = [name for name in REGISTRY if get(name).kind == "detector"]
EVERY = pytest.mark.parametrize("name", NAMES)
SINGLE = pytest.mark.parametrize("name", [name for name in NAMES if not get(name).stateful])
# What makes one short, and fit for the small images.
SHORT: dict[str, dict[str, Any]] = {
    "feature-squeezing": {"bits": 3, "search": 5},
    "region": {"radius": 0.1, "votes": 60},
    "magnet-error": {"epochs": 4},
    "magnet-divergence": {"epochs": 4},
    "mahalanobis": {"layers": 2, "eps": 0.1},
    "lid": {"layers": 2, "eps": 0.1, "neighbours": 10},
    "similarity": {"epochs": 2, "neighbours": 5, "history": 98},
}
_KEPT: dict[tuple[str, tuple[float, float]], Fitted] = {}


class Net(nn.Module):
    """Tells bright corners apart: four classes, a convolution and two linear layers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 16, 16)
        self.last = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        pooled = nn.functional.adaptive_avg_pool2d(torch.tanh(self.conv(x)), 4)
        logits: Tensor = 6 * self.last(torch.relu(self.hidden(pooled.flatten(1))))
        return logits


def images(n: int, seed: int, channels: int = 1, bounds: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """Smooth images in the box, alike in kind but no two the same."""
    coarse = torch.rand(n, channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    x = nn.functional.interpolate(coarse, (12, 12), mode="bilinear")
    return x * (bounds[1] - bounds[0]) + bounds[0]


def classifier(channels: int = 1, bounds: tuple[float, float] = (0.0, 1.0)) -> Classifier:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        module = Net(channels).eval()
    width = bounds[1] - bounds[0]
    return Classifier(module, bounds, mean=bounds[0] + width / 2, std=width / 4)


def fitted(name: str, bounds: tuple[float, float] = (0.0, 1.0)) -> Fitted:
    """A detector that has learnt from 160 images, with its threshold from 99 others; made once."""
    if (name, bounds) not in _KEPT:
        clf = classifier(bounds=bounds)
        short = dict(SHORT[name])
        for key in ("eps", "radius"):
            if key in short:
                short[key] *= bounds[1] - bounds[0]
        learnt = get(name)(**short).fit(clf, images(160, 1, bounds=bounds), seed=3)
        _KEPT[name, bounds] = learnt.calibrated(images(99, 2, bounds=bounds), 0.05)
    return _KEPT[name, bounds]


@EVERY
def test_a_card_names_the_paper_and_the_listing_says_how_it_is_attacked(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = get(name)
    assert issubclass(kind, Detector)
    assert "arXiv:" in card(kind)
    assert kind.name == name
    assert kind.differentiable != kind.bpda
    assert run(["list", "defenses", "--json"]) == 0
    [row] = [row for row in json.loads(capsys.readouterr().out)["rows"] if row["name"] == name]
    assert row["kind"] == "detector"
    assert row["attacked by"] == kind.attacked_by() != ""
    assert row["paper"]


@EVERY
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 3.0)])
def test_scores_are_one_number_a_sample_in_any_box(name: str, bounds: tuple[float, float]) -> None:
    detector = fitted(name, bounds)
    x = images(20, 5, bounds=bounds)
    scores = detector.score(x)
    assert scores.shape == (20,)
    assert scores.dtype == torch.float32
    assert not bool(scores.isnan().any())
    assert len(scores[scores.isfinite()].unique()) > 1, "a detector that sees no difference"
    assert detector.score(x[:0]).shape == (0,)
    assert torch.equal(detector.flags(x), scores > detector.threshold)
    assert torch.equal(scores, detector.score(x))


@SINGLE
def test_a_score_is_its_input_s_alone(name: str) -> None:
    detector, x = fitted(name), images(9, 6)
    together = detector.score(x)
    for k in range(3):
        alone = detector.score(x[k : k + 1], index=torch.tensor([k]))
        assert torch.allclose(alone, together[k : k + 1], rtol=1e-3, atol=1e-4)


@EVERY
def test_the_threshold_keeps_its_false_positive_rate_on_fresh_images(name: str) -> None:
    detector = fitted(name)
    held_out = detector.detector.usual(detector, images(99, 2))
    assert float((held_out > detector.threshold).float().mean()) <= 0.05
    n = 400
    flagged = int(detector.flags(images(n, 7)).sum())
    # Threshold and count are both random: mean 0.05, and a beta-binomial's deviation, of which four.
    deviation = math.sqrt(0.05 * 0.95 * (1 / n + 1 / 101))
    assert flagged / n <= 0.05 + 4 * deviation
    with pytest.raises(RobustError, match="held-out images cannot bound"):
        detector.calibrated(images(10, 2), 0.05)


@SINGLE
def test_the_gradient_is_finite_and_its_value_the_score(name: str) -> None:
    detector, x = fitted(name), images(8, 8)
    at = x.clone().requires_grad_(True)
    scores = detector.score(at)
    (gradient,) = torch.autograd.grad(scores.sum(), at)
    assert bool(gradient.isfinite().all())
    assert bool((gradient.flatten(1).abs().amax(1) > 0).float().mean() > 0.5)
    if not detector.randomised:
        assert torch.allclose(scores.detach(), detector.score(x), atol=1e-5)


@SINGLE
def test_the_attack_that_knows_it_finds_lower_scores_than_one_that_does_not(name: str) -> None:
    detector = fitted(name)
    clf, x = detector.clf, images(16, 9)
    y = clf.logits(x).argmax(1)
    plain = PGD(threat=Linf(0.15), steps=20).run(clf, x, y)
    aware = attack("detector-aware")(threat=Linf(0.15), detector=detector, steps=30).run(clf, x, y)
    wrong = clf.logits(aware.x_adv).argmax(1) != y
    assert torch.equal(aware.success, wrong & ~detector.flags(aware.x_adv)), "wrong, and not flagged"
    unseen = plain.success & ~detector.flags(plain.x_adv)
    assert int(aware.success.sum()) >= int(unseen.sum())
    both = wrong & plain.success
    assert bool(both.any())
    assert float(detector.score(aware.x_adv)[both].mean()) < float(detector.score(plain.x_adv)[both].mean())
    assert bool(Linf(0.15).inside(aware.x_adv, x, clf.bounds).all())


@EVERY
def test_it_learns_the_same_from_the_same_seed_and_is_kept_whole(name: str, tmp_path: Path) -> None:
    detector, x = fitted(name), images(12, 10)
    clf = detector.clf
    again = get(name)(**SHORT[name]).fit(clf, images(160, 1), seed=3)
    assert torch.equal(again.score(x), detector.score(x))
    detector.save(tmp_path / "kept")
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"detector.json", "detector.safetensors"}
    kept = load_detector(tmp_path / "kept", clf)
    assert kept.detector == detector.detector
    assert (kept.threshold, kept.fpr, kept.held_out) == (detector.threshold, 0.05, 99)
    assert torch.equal(kept.score(x), detector.score(x))
    other = Classifier(Net(1).eval())
    with pytest.raises(RobustError, match="learnt from another model"):
        load_detector(tmp_path / "kept", other)


@EVERY
def test_the_model_is_left_as_it_was(name: str) -> None:
    clf, x = classifier(), images(40, 11)
    clf.module.train()
    before = {key: value.clone() for key, value in clf.module.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        detector = get(name)(**SHORT[name]).fit(clf, x)
    scores = detector.score(x[:9].clone().requires_grad_(True))
    scores[scores.isfinite()].sum().backward()
    assert clf.module.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in clf.module.parameters())
    assert all(torch.equal(before[key], value) for key, value in clf.module.state_dict().items())
    assert not any(module._forward_pre_hooks for module in clf.module.modules())


@EVERY
def test_what_makes_no_sense_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    clf, x = classifier(), images(40, 12)
    for call in (
        lambda: get(name)(**SHORT[name]).fit(nn.Identity(), x),
        lambda: get(name)(**SHORT[name]).fit(clf, x[:0]),
        lambda: get(name)(**SHORT[name]).fit(clf, x + 2),
        lambda: fitted(name).calibrated(x, 0.0),
    ):
        with torch.no_grad(), pytest.raises(RobustError) as caught:
            call()
        assert "\n" not in str(caught.value)
    for field, default in vars(get(name)()).items():
        if isinstance(default, int | float):
            with pytest.raises(RobustError, match=f"{field}=") as caught:
                get(name)(**{field: -1})
            assert str(caught.value).startswith(name)
    assert run(["eval", "--defense", name]) == 2
    assert f"it is for robust detect --detector {name}" in capsys.readouterr().err


@EVERY
def test_it_tells_what_it_is(name: str) -> None:
    detector = fitted(name)
    told = json.loads(json.dumps(detector.describe()))
    assert told["name"] == name
    assert get(name)(**told["parameters"]) == detector.detector
    assert told["threshold"] == detector.threshold
    assert (told["fpr"], told["held_out"]) == (0.05, 99)
