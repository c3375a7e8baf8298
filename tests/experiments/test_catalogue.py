"""The catalogue against peers, the papers' points, and the curves: their code on tiny work, and their records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robust.attacks import get
from robust.classifier import Classifier
from robust.digest import read_json
from robust.errors import ConfigError, RunError
from robust.experiments.benchmarks import catalogue, rivals
from robust.experiments.benchmarks.catalogue import Catalogue, Family
from robust.experiments.benchmarks.harness import RESULTS, WrongResult
from robust.experiments.benchmarks.rivals import Task
from robust.experiments.catalogue import page
from robust.experiments.catalogue.curves import contestants, draw, grid, measure
from robust.experiments.catalogue.points import POINTS, Subject
from robust.threat import L2
from tests.experiments.bench_parts import copied, subject, work

FAMILIES = {
    "deepfool": Family("deepfool", Task("l2", steps=20)),
    "square": Family("square", Task("linf", queries=30, eps=0.2), success=True),
    "hopskipjump": Family("hopskipjump", Task("l2"), blind=True),
}


def near(module: Any, task: Task) -> Any:
    """A fake peer that is as good as ours."""
    attack = get("deepfool")(threat=L2(), steps=20)
    return lambda x, y: attack(Classifier(module), x, y, precision="original")


def idle(module: Any, task: Task) -> Any:
    """A fake peer that asks once and changes nothing."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        module(x)
        return x.clone()

    return run


def fails(module: Any, task: Task) -> Any:
    """A fake peer that cannot run."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        raise ValueError("no such thing\nas this")

    return run


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake libraries in the places of the real ones."""
    table = {
        "deepfool": {"foolbox": near, "torchattacks": idle, "art": fails},
        "square": {"torchattacks": idle},
        "hopskipjump": {"foolbox": idle},
    }
    monkeypatch.setattr(rivals, "RIVALS", table)
    monkeypatch.setattr(catalogue, "RIVALS", table)
    here = {name: object() for name in ("foolbox", "torchattacks", "art")}
    monkeypatch.setattr(catalogue, "available", lambda *_: (here, {}))


@pytest.mark.usefixtures("peers")
def test_every_family_is_compared_with_the_best_peer_at_equal_steps_or_queries() -> None:
    record = copied(Catalogue(families=FAMILIES).record(work()))
    deepfool = record["families"]["deepfool"]
    assert deepfool["best"] == "foolbox"
    assert deepfool["contestants"]["ours"]["median"] == pytest.approx(
        deepfool["contestants"]["foolbox"]["median"], rel=1e-3
    )
    assert abs(deepfool["excess"]) < 1e-3
    assert deepfool["contestants"]["torchattacks"]["median"] is None
    assert deepfool["faster"] > 0
    assert record["skipped"] == {"deepfool/art": "deepfool: art fails: no such thing"}
    square = record["families"]["square"]
    assert square["contestants"]["ours"]["success"] >= square["contestants"]["torchattacks"]["success"] == 0
    assert record["families"]["hopskipjump"]["queries"] == 1, "as few as the most frugal peer"
    assert record["families"]["hopskipjump"]["contestants"]["ours"]["asked"] <= 1
    heads, rows = Catalogue().table(record)
    assert all(len(row) == len(heads) for row in rows)
    assert [row[0] for row in rows] == list(FAMILIES)


@pytest.mark.usefixtures("peers")
def test_only_picks_families_and_libraries() -> None:
    record = Catalogue(families=FAMILIES).record(work(only=("deepfool",)))
    assert list(record["families"]) == ["deepfool"]
    with pytest.raises(ConfigError, match="no peer 'x'"):
        Catalogue().record(work(only=("x",)))


@pytest.mark.usefixtures("peers")
def test_a_lie_of_ours_ends_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from robust.attacks.base import Attack
    from robust.attacks.trial import Trial

    def finish(self: Trial) -> tuple[Tensor, Tensor]:
        return self.x, torch.ones(len(self.x), dtype=torch.bool)

    monkeypatch.setattr(Trial, "finish", finish)
    assert issubclass(get("deepfool"), Attack)
    with pytest.raises(WrongResult, match="denied by the plain model"):
        Catalogue(families={"deepfool": FAMILIES["deepfool"]}).record(work(only=("torchattacks",)))


def test_records_of_some_families_each_are_joined_if_their_conditions_are_one() -> None:
    head = {key: key for key in ("benchmark", "device", "versions", "settings", "model")}
    one = {**head, "date": "2", "commit": "new", "families": {"square": {"n": 1}}, "skipped": {}}
    two = {**head, "date": "1", "commit": "old", "families": {"deepfool": {"n": 2}}, "skipped": {"x": "y"}}
    whole = catalogue.merge([one, two])
    families = [("deepfool", {"commit": "old", "n": 2}), ("square", {"commit": "new", "n": 1})]
    assert list(whole["families"].items()) == families
    assert (whole["date"], whole["skipped"]) == ("2", {"x": "y"})
    with pytest.raises(RunError, match="square: in two"):
        catalogue.merge([one, one])
    with pytest.raises(RunError, match="versions differ"):
        catalogue.merge([one, {**two, "versions": "other"}])


def test_every_family_and_every_peer_s_family_exists() -> None:
    assert set(rivals.RIVALS) >= set(catalogue.FAMILIES)
    for family in catalogue.FAMILIES.values():
        kind = get(family.attack)
        assert family.task.norm in kind.norms
        assert set(family.fields) <= set(kind.__dataclass_fields__)


@pytest.fixture(scope="module")
def digits() -> Subject:
    """The shipped model on a few samples that it classifies correctly."""
    clf, x, y = subject(6)
    right = clf.logits(x).argmax(1) == y
    return Subject(clf, x[right], y[right])


@pytest.mark.parametrize(
    "name", ["ead-sparser-than-cw", "sigma-zero-against-jsma", "superdeepfool-against-deepfool"]
)
def test_a_point_is_measured(name: str, digits: Subject) -> None:
    facts = POINTS[name](digits)
    assert isinstance(facts["holds"], bool)
    assert len(facts) >= 3
    assert "arXiv:" in (POINTS[name].__doc__ or "")


def test_a_curve_is_measured_and_drawn(digits: Subject, tmp_path: Any) -> None:
    assert grid(1000)[0] == 1
    assert grid(1000)[-1] == 1000
    assert {"square", "nes"} <= set(contestants("score", "linf"))
    assert {"hopskipjump", "rays"} <= set(contestants("decision", "linf"))
    panels = []
    for knowledge, name, eps in (("score", "square", 0.2), ("decision", "hopskipjump", None)):
        curve = measure(digits, name, "linf", eps, 60)
        assert curve["success"] == sorted(curve["success"])
        assert curve["asked"] <= 61 * len(digits.x)
        panels += 2 * [{"knowledge": knowledge, "norm": "linf", "eps": eps, "curves": {name: curve}}]
    draw(panels, tmp_path / "curves.svg")
    text = (tmp_path / "curves.svg").read_text()
    assert "hopskipjump" in text
    assert text.startswith("<?xml")


def test_the_readme_says_what_the_records_say() -> None:
    text = page.README.read_text(encoding="utf-8")
    assert page.PAGE.fill(text) == text


@pytest.mark.parametrize("path", sorted(page.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_a_record_names_its_conditions(path: Path) -> None:
    record = read_json(path)
    parts = record["points"].values() if path.stem == "points" else [record]
    for part in parts:
        assert part["commit"]
        assert part["versions"]["torch"]
        assert part["device"]["name"]
    if path.stem == "points":
        assert set(record["points"]) <= set(POINTS)
        assert all(facts["claim"].endswith(".") for facts in record["points"].values())
    elif path.stem == "masked":
        plain, *hidden = record["masks"].values()
        assert all(found["full"]["robust_accuracy"] < found["pgd"]["robust_accuracy"] for found in hidden)
        assert all(found["pgd"]["warnings"] for found in hidden)
        assert all(found["decision"]["robust_accuracy"] < found["pgd"]["robust_accuracy"] for found in hidden)
        assert plain["full"]["robust_accuracy"] <= plain["pgd"]["robust_accuracy"]
    else:
        named = {name for panel in record["panels"] for name in panel["curves"]}
        assert named >= {"square", "nes", "bandits", "rays", "hopskipjump", "boundary", "sign-opt"}


@pytest.mark.parametrize("path", sorted(RESULTS.glob("catalogue*.json")), ids=lambda path: path.stem)
def test_on_the_catalogues_record_each_family_is_as_strong_as_its_best_peer_and_faster(path: Path) -> None:
    rows = read_json(path)["families"]
    assert set(rows) <= set(catalogue.FAMILIES)
    for name, one in rows.items():
        assert one["best"] in one["contestants"], name
        assert one["excess"] <= catalogue.WORSE, name
        assert one["faster"] > 1, name
