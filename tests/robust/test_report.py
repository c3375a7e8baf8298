"""The report: its numbers are the verdict's, its intervals exact, its page one file that asks for nothing else."""

from __future__ import annotations

import base64
import io
import math
import re
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from torch import Tensor, nn

from robust import Classifier, Linf, Verdict, evaluate
from robust.report import clopper_pearson, write_report
from robust.report_figures import Point, bound_from_distances, curve_svg, eps_text, magnified, png
from robust.verdict import Samples

EPS = 0.25
SIDE = 4


def linear(classes: int = 3) -> Classifier:
    """A classifier whose logits are the first pixels, so that outcomes can be written down."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, classes, bias=False))
    with torch.no_grad():
        module[1].weight.copy_(torch.eye(3 * SIDE * SIDE)[:classes])
    return Classifier(module, name="linear")


def images(labels: Tensor, margin: Tensor) -> Tensor:
    """Images of which the true class's pixel leads the others by `margin`: they fall at half of it in linf."""
    x = torch.full((len(labels), 3 * SIDE * SIDE), 0.4)
    x[torch.arange(len(labels)), labels] += margin
    return x.view(-1, 3, SIDE, SIDE)


@pytest.fixture
def subject() -> tuple[Classifier, Tensor, Tensor]:
    """Twenty samples: two wrong from the start, six that fall within 0.05, six within 0.1, six that stand."""
    labels = torch.arange(20) % 3
    margin = torch.tensor([-0.1] * 2 + [0.06] * 6 + [0.16] * 6 + [0.5] * 6)
    return linear(), images(labels, margin), labels


def judged(subject: tuple[Classifier, Tensor, Tensor], out: Path | None = None, **options: object) -> Verdict:
    """A verdict of two gradient attacks at two radii."""
    threats = [Linf(0.05), Linf(0.1)]
    return evaluate(*subject, threat=threats, suite=["fgsm", "pgd"], out=out, **options)  # type: ignore[arg-type]


def made(
    *,
    labels: list[int],
    clean: list[int],
    adversarial: list[int | None],
    classes: list[str],
    norm: str = "linf",
    oracle: bool = False,
) -> tuple[Verdict, Tensor]:
    """A verdict written down by hand: the clean and the adversarial predictions (None: not broken) of each sample."""
    total = len(labels)
    broken = [a is not None for a in adversarial]
    samples = Samples(
        y=labels,
        digest=["0"] * total,
        prediction=clean,
        confidence=[0.9] * total,
        correct=[p == y for p, y in zip(clean, labels, strict=True)],
        broken_by=["pgd" if b else None for b in broken],
        eps=[EPS if b else math.inf for b in broken],
        distance=[EPS if b else math.nan for b in broken],
        adversarial_prediction=[-1 if a is None else a for a in adversarial],
        adversarial_confidence=[0.8 if b else math.nan for b in broken],
        marginal=[False] * total,
    )
    index = torch.tensor(broken).nonzero()[:, 0]
    cost = {"forwards": 1000.0, "backwards": 10.0, "queries": 0.0, "seconds": 1.5}
    stages = [
        {"attack": "pgd", "eps": EPS, "attempted": sum(samples.correct), "broken": sum(broken), "cost": cost}
    ]
    manifest = {
        "model": {"name": "<made>", "classes": len(classes), "bounds": [0.0, 1.0], "oracle": oracle},
        "data": {"name": "by & hand", "classes": classes},
        "threat": {"norm": norm, "eps": [EPS]},
        "suite": {"name": "pgd"},
        "seed": 3,
        "stages": stages,
        "cost": cost,
        "warnings": [],
        "command": ["python"],
    }
    x = torch.full((total, 1, 6, 5), 0.5)
    return Verdict(samples, index, x[index] + EPS, manifest), x


def text_of(page: str) -> str:
    """What a reader reads, spaces joined."""
    body = re.sub(r"<(style|script|svg).*?</\1>", " ", page, flags=re.S)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


def written(verdict: Verdict, x: Tensor, tmp_path: Path) -> str:
    """The page of a verdict."""
    return write_report(verdict, x, verdict.labels, None, tmp_path / "report.html").read_text(
        encoding="utf-8"
    )


def test_the_headline_is_the_verdicts(subject: tuple[Classifier, Tensor, Tensor], tmp_path: Path) -> None:
    verdict = judged(subject)
    assert (verdict.clean_accuracy, verdict.robust_accuracy) == (0.9, 0.3)
    page = written(verdict, subject[1], tmp_path)
    text = text_of(page)
    low, high = clopper_pearson(6, 20)
    assert "Clean accuracy 90.0 % 95 % interval" in text
    assert f"Robust accuracy 30.0 % 95 % interval {100 * low:.1f} % to {100 * high:.1f} %" in text
    assert "6 robust 12 broken by an attack 2 wrong without an attack" in text
    assert "linear on tensors" in text
    assert "linf radius 0.1" in text
    for eps, accuracy in ((0.05, "60.0 %"), (0.1, "30.0 %")):
        assert f"{eps} {accuracy}" in text


def test_the_waterfall_adds_up(subject: tuple[Classifier, Tensor, Tensor], tmp_path: Path) -> None:
    verdict = judged(subject)
    text = text_of(written(verdict, subject[1], tmp_path))
    waterfall = text[text.index("all samples 20") : text.index("Accuracy against the radius")]
    amounts = [int(part.replace("−", "-")) for part in re.findall(r"(?<= )−?\d+(?= |$)", waterfall)]
    assert amounts[0] + sum(amounts[1:-1]) == amounts[-1] == 6
    assert "wrong without an attack −2" in waterfall
    assert "fgsm −12" in waterfall
    assert "pgd 0" in waterfall


def test_the_page_is_one_file_that_asks_for_nothing(
    subject: tuple[Classifier, Tensor, Tensor], tmp_path: Path
) -> None:
    page = written(judged(subject), subject[1], tmp_path)
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"<(script|link(?! rel=\"icon\" href=\"data:)|iframe|object)", page)
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not list(tmp_path.glob("*.part"))


def test_the_gallery_shows_the_clean_and_the_stored_example(
    subject: tuple[Classifier, Tensor, Tensor], tmp_path: Path
) -> None:
    verdict = judged(subject)
    page = written(verdict, subject[1], tmp_path)
    cards = re.findall(r'<li class="sample">.*?</li>', page, flags=re.S)
    assert len(cards) == 12
    for card in cards:
        row = int(re.search(r"sample (\d+)", card)[1])  # type: ignore[index]
        shown = [decoded(uri) for uri in re.findall(r'src="(data:[^"]*)"', card)]
        stored = verdict.adversarial[verdict.adversarial_index.tolist().index(row)]
        assert np.array_equal(shown[0], levels(subject[1][row]))
        assert np.array_equal(shown[2], levels(stored))
        factor = int(re.search(r"change × (\d+)", card)[1])  # type: ignore[index]
        assert np.allclose(shown[1], levels(0.5 + factor * (stored - subject[1][row])), atol=1)
        predicted = int(verdict.adversarial_predictions[row])
        text = text_of(card)
        assert f"{int(subject[2][row])} {verdict.samples.confidence[row]:.1%}".replace("%", " %") in text
        assert f"{predicted} {verdict.samples.adversarial_confidence[row]:.1%}".replace("%", " %") in text


def decoded(uri: str) -> np.ndarray:
    """The pixels of a data URI, (H, W, C)."""
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.atleast_3d(np.asarray(picture)).astype(int)


def levels(image: Tensor) -> np.ndarray:
    """An image as 8-bit levels, (H, W, C)."""
    return (image.clamp(0, 1) * 255).round().int().permute(1, 2, 0).numpy()


def test_without_a_broken_sample_the_page_says_so(tmp_path: Path) -> None:
    verdict, x = made(labels=[0, 1], clean=[0, 1], adversarial=[None, None], classes=["a", "b"])
    text = text_of(written(verdict, x, tmp_path))
    assert "No sample was broken" in text
    assert "broke none of them" in text
    assert "No check of the run raised a doubt" in text


def test_with_every_sample_wrong_the_page_still_stands(tmp_path: Path) -> None:
    verdict, x = made(labels=[0, 0, 1], clean=[1, 1, 0], adversarial=[None] * 3, classes=["a", "b"])
    text = text_of(written(verdict, x, tmp_path))
    assert "Clean accuracy 0.0 %" in text
    assert "3 wrong without an attack" in text


def test_names_are_escaped_and_nan_predictions_named(tmp_path: Path) -> None:
    verdict, x = made(labels=[0, 1, 1], clean=[0, 1, -1], adversarial=[1, -1, None], classes=["<b>", "c&d"])
    page = written(verdict, x, tmp_path)
    assert "<b>c" not in page
    assert "&lt;b&gt;" in page
    assert "&lt;made&gt;" in page
    assert "c&d → NaN" in text_of(page)


def test_a_model_that_only_answers_has_no_confidences(tmp_path: Path) -> None:
    verdict, x = made(labels=[0], clean=[0], adversarial=[1], classes=["a", "b"], oracle=True)
    page = written(verdict, x, tmp_path)
    assert "a → b sample 0" in text_of(page)


def test_many_classes_become_a_list_of_the_commonest_confusions(tmp_path: Path) -> None:
    labels = [k % 30 for k in range(60)]
    adversarial = [(y + 1) % 30 if y < 5 else None for y in labels]
    names = [f"class-{k}" for k in range(30)]
    verdict, x = made(labels=labels, clean=labels, adversarial=adversarial, classes=names)
    page = written(verdict, x, tmp_path)
    assert '<table class="confusion' not in page
    assert "class-4 → class-5 2" in text_of(page)


def test_the_confusion_matrix_counts_every_sample_once(tmp_path: Path) -> None:
    verdict, x = made(
        labels=[0, 0, 0, 1, 1, 2],
        clean=[0, 0, 1, 1, 1, 2],
        adversarial=[1, None, None, 2, None, 0],
        classes=["a", "b", "c"],
    )
    page = written(verdict, x, tmp_path)
    tables = re.findall(r'<table class="confusion.*?</table>', page, flags=re.S)
    cells = [
        [int(c or 0) for c in re.findall(r'<td class="(?:stood|fell)"[^>]*>(\d*)</td>', t)] for t in tables
    ]
    assert cells == [[2, 1, 0, 0, 2, 0, 0, 0, 1], [1, 2, 0, 0, 1, 1, 1, 0, 0]]


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (1, 10), (5, 10), (10, 10), (912, 1000), (0, 1)])
def test_the_interval_is_clopper_and_pearsons(successes: int, total: int) -> None:
    low, high = clopper_pearson(successes, total)
    assert 0 <= low <= successes / total <= high <= 1
    if successes:
        assert binom.sf(successes - 1, total, low) == pytest.approx(0.025, rel=1e-6)
    else:
        assert low == 0
    if successes < total:
        assert binom.cdf(successes, total, high) == pytest.approx(0.025, rel=1e-6)
    else:
        assert high == 1


def test_without_a_trial_the_interval_is_everything() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("eps", "text"),
    [
        (8 / 255, "8/255"),
        (0.5 / 255, "0.5/255"),
        (0.25 / 255, "0.25/255"),
        (0.1, "0.1"),
        (float(torch.tensor(0.1)), "0.1"),
        (0.3, "0.3"),
        (12.0, "12"),
        (1.23456, "1.235"),
        (math.inf, "∞"),
    ],
)
def test_a_radius_is_written_as_people_write_it(eps: float, text: str) -> None:
    assert eps_text(eps) == text


def test_found_distances_bound_the_accuracy_from_above() -> None:
    correct = torch.tensor([True, True, True, False])
    distance = torch.tensor([0.2, math.nan, 0.1, math.nan], dtype=torch.float64)
    assert bound_from_distances(correct, distance) == [(0.0, 0.75), (0.1, 0.5), (0.2, 0.25)]


def test_a_long_bound_is_thinned_and_stays_above() -> None:
    distance = torch.arange(1, 1001, dtype=torch.float64)
    assert len(bound_from_distances(torch.ones(199, dtype=torch.bool), distance[:199])) == 200
    thinned = bound_from_distances(torch.ones(1000, dtype=torch.bool), distance)
    assert len(thinned) < 210
    assert thinned[-1] == (1000.0, 0.0)
    for (_, before), (at, after) in pairwise(thinned):
        assert before > after
        assert after >= 1 - at / 1000 - 1e-12


def test_the_magnified_change_is_visible_and_its_factor_whole() -> None:
    clean = torch.full((1, 2, 2), 0.5)
    image, factor = magnified(clean, clean + torch.tensor([[[0.0098, -0.0098], [0, 0]]]), 1.0)
    assert factor == 40
    assert image.flatten().tolist() == pytest.approx([0.892, 0.108, 0.5, 0.5], abs=1e-4)
    assert magnified(clean, clean, 1.0)[1] == 1
    assert magnified(clean * 255, clean * 255 + 2.5, 255.0)[1] == 40
    assert magnified(clean, clean + 0.5, 1.0)[1] == 1


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_channels_and_shape_become_png(channels: int) -> None:
    pixels = decoded(png(torch.linspace(0, 1, channels * 3 * 7).view(channels, 3, 7)))
    assert pixels.shape == (3, 7, channels if channels in (1, 3) else 1)
    assert decoded(png(torch.rand(3, 1000, 500))).shape == (320, 160, 3)


def test_the_curve_stays_inside_its_frame() -> None:
    points = [Point(0.0, 1.0, 0.9, 1.0), Point(0.5, 0.0, 0.0, 0.2)]
    svg = curve_svg(points, [(0.0, 1.0), (0.5, 0.0)], norm="l2", chance=0.1)
    assert "NaN" not in svg
    for x, y in re.findall(r'cx="([\d.-]+)" cy="([\d.-]+)"', svg):
        assert 0 <= float(x) <= 480
        assert 0 <= float(y) <= 300
