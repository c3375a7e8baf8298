"""Runs of universal attacks and patches: what counts as success, what is written, and bad input in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.cli.main import run
from robust.data import load_data
from robust.models import load_model
from robust.registry import room
from robust.universal import Outcome, outcome, success_grid
from robust.universal_run import doubts, learn_and_measure
from tests.robust.pictures import save
from tests.robust.test_cli import answer, complaint


def test_success_leaves_out_what_was_wrong_before_and_what_is_of_the_target_class() -> None:
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    clean = torch.tensor([0, 1, 1, 1, 2, -1])
    changed = torch.tensor([2, 2, 1, 2, 2, 0])
    away = Outcome(y, clean, changed)
    assert away.attempted.tolist() == [True, False, True, True, True, False]
    assert away.fooled.tolist() == [True, False, False, True, False, False]
    assert away.rate == 0.5
    towards = Outcome(y, clean, changed, 2)
    assert towards.attempted.tolist() == [True, False, True, True, False, False]
    assert towards.rate == pytest.approx(2 / 3)
    found = towards.summary()
    assert (found["fooled"], found["attempted"], found["n"]) == (2, 3, 6)
    assert found["interval"][0] < 2 / 3 < found["interval"][1]
    assert found["clean_accuracy"] == pytest.approx(4 / 6)
    assert found["robust_accuracy"] == pytest.approx(2 / 6), "accuracy is of all images"
    assert Outcome(y, torch.full((6,), 9), changed).rate is None


class Bright(nn.Module):
    """Class 1 where the mean is above a half."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 2)."""
        mean = x.mean((1, 2, 3))
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_every_image_is_asked_about_with_its_own_index_over_chunks() -> None:
    x, y = torch.full((600, 1, 2, 2), 0.2), torch.zeros(600, dtype=torch.long)
    seen: list[Tensor] = []

    def apply(images: Tensor, index: Tensor) -> Tensor:
        seen.append(index)
        return torch.where((index % 3 == 0)[:, None, None, None], 0.9, images)

    clf = Classifier(Bright().eval())
    found = outcome(clf, (x, y), apply)
    assert torch.cat(seen).tolist() == list(range(600))
    assert found.fooled.nonzero()[:, 0].tolist() == list(range(0, 600, 3))
    known = outcome(clf, (x, y), apply, clean=torch.ones(600, dtype=torch.long))
    assert int(known.attempted.sum()) == 0, "clean predictions that are given are not asked for"


def test_a_grid_has_a_rate_for_every_scale_and_angle() -> None:
    x, y = torch.full((10, 1, 2, 2), 0.2), torch.zeros(10, dtype=torch.long)
    clf = Classifier(Bright().eval())
    before = outcome(clf, (x, y), lambda images, _: images)

    def apply(images: Tensor, index: Tensor, angle: float, scale: float) -> Tensor:
        return torch.full_like(images, 0.9 if angle > 0 and scale > 1 else 0.1)

    grid = success_grid(clf, (x, y), apply, ((-5.0, 0.0, 5.0), (1.0, 2.0)), before, most=4)
    assert grid.rates == ((0.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    assert grid.n == 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attempted": 50, "interval": [0.1, 0.4]}, "only 50 unseen images"),
        ({"clean_accuracy": 0.12}, "guessing"),
        ({"control": {"success_rate": 0.6}}, "noise of the same size"),
        ({"history": [{"loss": -1.0}, {"loss": -2.0}]}, "did not rise"),
        ({"success_rate": None}, "no unseen image counts"),
    ],
)
def test_a_weak_number_carries_its_doubt(change: dict[str, Any], said: str) -> None:
    sound = {
        "attempted": 900,
        "interval": [0.79, 0.81],
        "success_rate": 0.8,
        "clean_accuracy": 0.9,
        "control": {"success_rate": 0.1},
        "history": [{"loss": -2.0}, {"loss": -1.0}],
    }
    assert doubts(sound, 10) == []
    [line] = doubts({**sound, **change}, 10)
    assert said in line


QUICK = ["--n", "40", "--train", "60", "--set", "steps=15"]


def test_a_patch_on_the_command_line_writes_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    save(photo, 3, (40, 30, 3))
    out = tmp_path / "out"
    extra = ["--out", str(out), "--also", "zoo:digits-at", "--photo", str(photo), "--width-mm", "50"]
    found = json.loads(
        answer(capsys, "attack", "patch", *QUICK, "--size", "3x2", "--target", "8", *extra, "--json")
    )
    assert found == json.loads((out / "summary.json").read_text())
    assert {"clean_accuracy", "robust_accuracy", "n", "threat", "suite", "seconds", "warnings", "out"} <= set(
        found
    )
    assert (found["n"], found["train"], found["target"], found["shape"]) == (40, 60, 8, [3, 2])
    assert found["threat"] == {"norm": "patch", "eps": 1.0, "height": 3, "width": 2}
    assert found["attempted"] < found["n"], "no eights, and none that was wrong"
    assert [row["model"] for row in found["transfer"]] == ["digits-at"]
    assert len(found["grid"]["rates"]) == len(found["grid"]["scales"])
    assert found["photos"][0]["photo"] == "photo.png"
    assert sorted(path.name for path in out.iterdir()) == [
        *("patch.png", "patch.safetensors", "photos", "report.html", "summary.json"),
    ]
    with Image.open(out / "patch.png") as picture:
        assert picture.size == (591, 886)
        assert picture.info["dpi"][0] == pytest.approx(300, abs=0.1)
    with Image.open(out / "photos" / "photo.png") as picture:
        assert picture.size == (30, 40)
    assert "adversarial patch" in (out / "report.html").read_text()


@pytest.mark.parametrize("name", ["uap", "targeted-uap"])
def test_a_perturbation_on_the_command_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["attack", name, *QUICK, "--eps", "0.2", "--out", str(tmp_path / "out")]
    text = answer(capsys, *arguments)
    assert "fools" in text
    assert "noise of its size" in text
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert found["threat"] == {"norm": "linf", "eps": 0.2}
    assert (found["target"] is None) == (name == "uap")
    assert found["success_rate"] > found["control"]["success_rate"]
    assert (tmp_path / "out" / "perturbation.png").exists()
    again = json.loads(answer(capsys, *arguments[:-2], "--json"))
    assert again["success_rate"] == found["success_rate"], "keyed by the seed"
    assert again["out"] is None


def test_few_images_are_shared_half_and_half(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capsys, "attack", "uap", "--set", "steps=2", "--json"))
    assert abs(found["train"] - found["n"]) <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["patch", "--eps", "8/255"], "--eps: a patch has no radius"),
        (["patch", "--norm", "l2"], "no l2 form"),
        (["patch", "--size", "9x9"], "does not fit"),
        (["patch", "--size", "large"], "--size"),
        (["patch", "--size", "1.5"], "--size: a patch of 1.5"),
        (["patch", "--width-mm", "0"], "--width-mm"),
        (["patch", "--photo", "absent.png"], "--photo: absent.png does not exist"),
        (["patch", "--set", "shape=star"], "shape"),
        (["patch", "--set", "sides=3"], "unknown key 'sides'"),
        (["patch", "--also", "zoo:none"], "none"),
        (
            ["patch", "--also", "zoo:digits@absent"],
            "--also: model 'zoo:digits@absent': weights absent do not exist",
        ),
        (["patch", "--target", "second"], "--target: second is no class"),
        (["uap", "--target", "10"], "--target: 10 is no class"),
        (["uap", "--norm", "l1"], "no l1 form"),
        (["uap", "--eps", "0.1,0.2"], "one radius"),
        (["uap", "--size", "0.1"], "--size: uap has no use for it"),
        (["uap", "--train", "0"], "--train"),
        (["pgd", "--train", "5"], "--train: pgd has no use for it"),
        (["pgd", "--also", "zoo:digits-at"], "--also: pgd has no use for it"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    line = complaint(capsys, "attack", *arguments, "--n", "10", "--out", str(tmp_path / "out"))
    assert said in line
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert run(["attack", "uap", "--n", "10", "--out", str(tmp_path / "out")]) == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


def test_images_that_nothing_can_fool_are_reported_and_not_divided_by() -> None:
    from robust.data import load_data

    data = load_data("digits", n=20)
    clf = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval())
    with torch.no_grad():
        clf.module[1].weight.zero_()  # type: ignore[union-attr, operator]
        clf.module[1].bias.copy_(3 * torch.eye(10)[3])  # type: ignore[union-attr, operator]
    kind = room("attacks").load("patch")
    attack = kind.sized(0.2, 8, 8, steps=2)
    threes = data.subset([row for row in range(20) if int(data.labels[row]) == 3])
    found = learn_and_measure(attack, clf, data, threes, name="patch", target=3)
    assert found.summary["success_rate"] is None
    assert "no unseen image counts" in found.summary["warnings"][-1]


def test_an_untargeted_patch_says_which_class_it_leads_to(tmp_path: Path) -> None:
    data = load_data("digits", n=60)
    attack = room("attacks").load("patch").sized(0.2, 8, 8, steps=150, batch=8, step_size=0.2)
    found = learn_and_measure(
        attack, load_model("zoo:digits"), data.subset(range(30)), data.subset(range(30, 60)), name="patch"
    )
    assert found.summary["target"] is None
    assert found.summary["towards"] == data.classes[found.change.towards]
    assert found.summary["area"] == pytest.approx(0.2)
    found.write(tmp_path)
    text = " ".join((tmp_path / "report.html").read_text().split())
    assert (
        f"by leading to {found.summary['towards']}, whose own images it therefore hardly fools. Each" in text
    )
    side = f"{found.change.size[0]:.4g}"
    assert f"{side} × {side} pixels, 20.0 % of the image" in text
