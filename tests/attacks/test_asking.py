"""What rules may ask: several points a row, budgets, masks, points to begin from, tracks, and named targets."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from robust.attacks import REGISTRY, Attack, get
from robust.attacks.base import Knowledge
from robust.attacks.engine import make_jobs, run_rule, setting_of
from robust.attacks.phases import Heard, PhasedRule, Rows
from robust.attacks.query import Answer, Query
from robust.attacks.rule import Rule, Setting, State
from robust.attacks.several import best_of
from robust.attacks.trial import Trial
from robust.classifier import Classifier
from robust.errors import DataError, RobustError
from robust.losses import get as get_loss
from robust.oracle import Oracle
from robust.targets import named_targets
from robust.threat import L2, Linf
from robust.twin import make_twin
from tests.contracts.subjects import SmallNet, make, small


class Scatter(PhasedRule):
    """Asks three points in phase 0 and one in phase 1, in turn, and remembers what it was told."""

    width = 3
    want = "logits"

    def propose(self, phase: int, rows: Rows) -> Tensor:
        count = 3 if phase == 0 else 1
        draws = self.setting.draws({"identity": rows["identity"]}, "scatter", rows["t"])
        return rows["x"][:, None] + 0.2 * (draws.uniform(count, *rows["x"].shape[1:]) - 0.5)

    def learn(self, phase: int, rows: Rows, points: Tensor, heard: Heard) -> State:
        assert heard.loss is not None
        assert points.shape[1] == heard.asked.shape[1] == heard.loss.shape[1]
        if self.subject is not None:
            said = self.subject.logits(points.flatten(0, 1)).view(*points.shape[:2], -1)
            assert torch.allclose(said[heard.asked], heard.scores[heard.asked], atol=1e-5)
        assert not bool(heard.hit[~heard.asked].any())
        return {"phase": 1 - rows["phase"]}

    subject: Classifier | None = None


@dataclass(frozen=True, kw_only=True)
class Scattered(Attack):
    """Runs the rule above."""

    knowledge: ClassVar[Knowledge] = "score"
    queries: int = 10

    def attack(self, trial: Trial) -> None:
        rule = Scatter(setting_of(trial), self.queries, get_loss("margin"))
        rule.subject = trial.model if isinstance(trial.model, Classifier) else None
        run_rule(rule, trial, make_jobs(trial))


@pytest.mark.parametrize("queries", [1, 2, 4, 5, 7, 8, 41])
@pytest.mark.parametrize("oracle", [False, True])
def test_a_rule_that_asks_several_points_spends_its_budget_to_the_last_query(
    queries: int, oracle: bool
) -> None:
    clf, x, y = small(n=6)
    model = Oracle(clf) if oracle else clf
    before = clf.cost.forwards
    result = Scattered(threat=Linf(0.1), queries=queries).run(model, x, y)
    assert result.queries is not None
    assert result.queries.tolist() == [queries] * 6
    assert result.cost.queries == 6 * (queries + 1), "and one for each clean point"
    if oracle:
        assert isinstance(model, Oracle)
        assert model.cost.queries == result.cost.queries
        assert clf.cost.forwards - before == result.cost.queries


def test_the_best_of_several_points_is_kept_and_a_sample_stops_at_its_first_success() -> None:
    clf, x, y = small()
    strongest = Scattered(threat=Linf(0.1), queries=40).run(clf, x, y)
    margin = get_loss("margin")
    assert bool((margin(clf.logits(strongest.x_adv), y) >= margin(clf.logits(x), y)).all())
    broken = Scattered(threat=Linf(0.1), queries=40, until="broken").run(clf, x, y)
    assert torch.equal(broken.success, strongest.success)
    assert broken.queries is not None
    assert int(broken.queries[0]) == 0, "it was misclassified from the start"
    assert bool((broken.queries[~broken.success] == 40).all())


def test_best_of_prefers_rank_then_score_then_the_first() -> None:
    rank = torch.tensor([0, 1, 1, 0, 0, 0, 2, 0, 1])
    score = torch.tensor([9.0, 1.0, 2.0, -torch.inf, 3.0, 3.0, -torch.inf, 5.0, torch.nan])
    assert best_of(rank, score, 3).tolist() == [2, 4, 6]


class TwoGradients(Rule):
    """Asks the gradient at the point and at its neighbour in one query."""

    feasible = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.loss = get_loss("cross-entropy")

    def query(self, state: State) -> Query:
        x = state["x"]
        both = torch.stack([x, (x + 0.01).clamp(*self.setting.bounds)], 1).flatten(0, 1)
        return Query(both, "loss_grad", loss=self.loss)

    def step(self, state: State, answer: Answer) -> State:
        assert answer.gradient is not None
        self.seen = answer.gradient.view(len(state["x"]), 2, *state["x"].shape[1:])
        self.rows = state["row"]
        return {"t": state["t"] + 1}


def test_gradients_of_several_points_a_row_are_each_points_own() -> None:
    clf, x, y = small(n=4)
    trial = Trial(get("pgd")(threat=Linf(0.1)), clf, x, y)
    rule = TwoGradients(setting_of(trial))
    with trial.session():
        run_rule(rule, trial, make_jobs(trial))
    for shift, found in ((0.0, rule.seen[:, 0]), (0.01, rule.seen[:, 1])):
        points = (x + shift).clamp(0, 1).requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(clf(points), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, points)
        assert torch.allclose(found, gradient[rule.rows], atol=1e-6)


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "fab", "square", "hopskipjump"])
def test_a_mask_keeps_every_change_inside_it(name: str) -> None:
    clf, x, y = small()
    mask = torch.zeros(6, 7, dtype=torch.bool)
    mask[1:5, 2:6] = True
    result = make(name, "linf", 0.5).run(clf, x, y, mask=mask)
    assert bool((result.x_adv == x)[:, :, ~mask].all())
    free = make(name, "linf", 0.5).run(clf, x, y)
    assert 1 < int(result.success.sum()) <= int(free.success.sum())
    per_sample = mask.expand(12, 1, 6, 7)
    again = make(name, "linf", 0.5).run(clf, x, y, mask=per_sample)
    assert torch.equal(again.x_adv, result.x_adv)
    with pytest.raises(DataError, match="mask is"):
        make(name, "linf", 0.5).run(clf, x, y, mask=mask[:3])


def test_a_decision_attack_begins_where_it_is_told() -> None:
    clf, x, y = small()
    targets = (y + 1) % 5
    begin = get("pgd")(threat=Linf(1.0))(clf, x, y, targets=targets)
    attack = get("hopskipjump")(threat=L2(), queries=1)
    given = attack.run(clf, x, y, targets=targets, begin=begin)
    reached = clf.logits(begin).argmax(1) == targets
    assert torch.equal(given.success, reached)
    assert torch.equal(given.x_adv[reached], begin[reached])
    with pytest.raises(DataError, match="begin is"):
        attack.run(clf, x, y, begin=begin[:1, :, :2])
    with pytest.raises(DataError, match="outside the box"):
        attack.run(clf, x, y, begin=begin + 2)


def test_a_track_tells_loss_gradient_prediction_and_distance_of_every_step() -> None:
    clf, x, y = small(n=3)
    attack = get("pgd")(threat=Linf(0.05), steps=6, restarts=2)
    result = attack.run(clf, x, y, track="steps")
    assert result.track is not None
    table = result.track.table()
    assert len(table["sample"]) == 3 * 2 * 7
    own = (table["sample"] == 1) & (table["job"] == 1)
    assert table["step"][own].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert table["loss"][own].isfinite().all()
    assert bool((table["gradient_norm"][own][:6] > 0).all())
    assert table["prediction"][own][-1] >= 0
    assert attack.run(clf, x, y).track is None
    whole = get("autoattack")(threat=Linf(0.01), version="quick").run(clf, x, y, track="steps").track
    assert whole is not None
    assert set(whole.table()["sample"].tolist()) == {1, 2}, "the first was misclassified from the start"
    assert torch.equal(attack.run(clf, x, y).x_adv, result.x_adv)


def test_curves_against_queries_fall_in_distance_and_rise_in_success() -> None:
    clf, x, y = small()
    open_ = clf.logits(x).argmax(1) == y
    attack = get("hopskipjump")(threat=L2(), queries=600)
    result = attack.run(clf, x[open_], y[open_], track="best")
    whole = attack.run(clf, x[open_], y[open_], track="steps")
    assert result.track is not None
    assert whole.track is not None
    assert len(result.track.table()["sample"]) < len(whole.track.table()["sample"]) / 3
    curve = result.track.against_queries([0, 10, 50, 200, 600], int(open_.sum()))
    assert curve == whole.track.against_queries([0, 10, 50, 200, 600], int(open_.sum()))
    assert curve["success"] == sorted(curve["success"])
    assert curve["distance"] == sorted(curve["distance"], reverse=True)
    assert curve["success"][0] == 0
    assert curve["success"][-1] == 1
    assert curve["distance"][-1] == pytest.approx(float(result.distance.median()))


def test_targets_by_name_are_wrong_classes_and_keyed() -> None:
    clf, x, y = small()
    scores = clf.logits(x)
    index = torch.arange(len(x))
    second, least = (named_targets(name, scores, y, 0, index) for name in ("second", "least-likely"))
    random = named_targets("random", scores, y, 0, index)
    for found in (second, least, random):
        assert bool((found != y).all())
    others = scores.scatter(1, y[:, None], -torch.inf)
    assert torch.equal(second, others.argmax(1))
    assert torch.equal(least, scores.scatter(1, y[:, None], torch.inf).argmin(1))
    assert torch.equal(random[3:4], named_targets("random", scores[3:4], y[3:4], 0, index[3:4]))
    assert not torch.equal(random, named_targets("random", scores, y, 1, index))
    attack = get("pgd")(threat=Linf(0.3))
    result = attack.run(clf, x, y, targets="second")
    assert torch.equal(result.success, clf.logits(result.x_adv).argmax(1) == second)
    with pytest.raises(RobustError, match="targets='thrid' is unknown"):
        attack.run(clf, x, y, targets="thrid")
    labels = Oracle(clf, answers="labels", classes=5)
    with pytest.raises(RobustError, match="gives labels"):
        get("square")(threat=Linf(0.3), queries=5).run(labels, x, y, targets="second")


def test_the_readme_names_every_attack() -> None:
    text = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Attacks")[2].partition("## ")[0]
    named = {word for cell in re.findall(r"`([^`]+)`", section) for word in cell.split()}
    assert set(REGISTRY) <= named


@pytest.mark.parametrize("name", list(REGISTRY))
def test_every_attack_says_what_it_costs_and_what_it_knows(name: str) -> None:
    kind: Any = get(name)
    assert kind.knowledge in ("white", "score", "decision", "transfer")
    assert kind.passes() >= 1
    fields = kind.__dataclass_fields__
    for field in ("queries", "steps"):
        if field == "queries" and kind.knowledge == "transfer":
            continue  # asked once for a substitute, not for every sample
        if field in fields:
            assert kind.passes(**{field: 4000}) > kind.passes(**{field: 2})
            break


@pytest.mark.parametrize("name", ["ddn", "fmn", "fab", "deepfool"])
def test_the_original_searches_itself_where_it_denies_a_twin_s_smallest_perturbation(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clf, x, y = small()
    torch.manual_seed(1)
    other = SmallNet().eval()
    other.load_state_dict(clf.module.state_dict())
    with torch.no_grad():
        other.linear.bias += torch.tensor(
            [0.02, -0.02, 0.01, 0.0, -0.01]
        )  # another boundary than the original's

    def lying(model: Classifier, points: Tensor, dtype: torch.dtype) -> Any:
        twin = make_twin(Classifier(clf.module), points, dtype)
        assert twin is not None
        twin.module = make_twin(Classifier(other), points, dtype).module  # type: ignore[union-attr]
        return twin

    monkeypatch.setattr("robust.attacks.trial.make_twin", lying)
    attack = get(name)(threat=L2(), steps=30)
    result = attack.run(clf, x, y, precision="float32")
    assert result.notes["twin_denied"] > 0
    assert torch.equal(result.success, clf.logits(result.x_adv).argmax(1) != y)
    assert bool(result.success.all())
