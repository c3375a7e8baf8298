"""Doubts, one by one; suites by name and norm; and verdicts of an oracle, which are never called standard."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robust import L2, Classifier, Linf, Oracle, Verdict, evaluate
from robust.attacks import get
from robust.decide import decide, outcome
from robust.doubts import StageFacts, raise_doubts
from robust.errors import BudgetExceeded, ModelError, RobustError, ThreatError, UnknownName, VerificationError
from robust.suites import DESCRIPTIONS, Stage, stages
from tests.robust.subjects import between, linear

SOUND: dict[str, Any] = {
    "n": 1000, "correct": 900, "robust": 500, "classes": 10, "undefined": 0, "marginal": 0, "width": 1.0,
    "norm": "linf", "eps": 8 / 255, "randomised": False, "suite": "standard",
}  # fmt: skip


def white(**notes: float) -> StageFacts:
    """A white-box attack that saw these counts."""
    return StageFacts("apgd-ce", "white", 900, 400, notes)


def raised(*facts: StageFacts, **changes: Any) -> list[str]:
    """The doubts about a run that is sound but for these changes."""
    return raise_doubts(**{**SOUND, "stages": facts or (white(),), **changes})


# -- doubts ---------------------------------------------------------------------------------------------------


def test_a_sound_run_raises_none() -> None:
    sound = white(gradients=100, zero_gradients=5, searches=50, risen=25, budget_rows=50, budget_used=25)
    assert raised(sound, StageFacts("square", "score", 500, 9)) == []


# A change on the safe side of the threshold, one beyond it, and what the doubt then says; "…" ends what is its own.
EDGES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "accuracy at chance": ({"correct": 119, "robust": 0}, {"correct": 118, "robust": 0}, "at chance… for 10 classes"),
    "two classes": ({"correct": 532, "classes": 2}, {"correct": 531, "classes": 2}, "at chance… for 2 classes"),
    "few samples, all right": ({"n": 1, "correct": 1, "robust": 1, "classes": 2},
                               {"n": 1, "correct": 0, "robust": 0, "classes": 2}, "at chance… for 2 classes"),
    "NaN": ({}, {"undefined": 3}, "NaN or infinite logits… on 3 of 1000 clean samples"),
    "randomness": ({"randomised": True, "suite": "rand"}, {"randomised": True}, "randomised… , but suite standard"),
    "marginal rows": ({}, {"marginal": 2}, "2 outcomes are within float noise"),
    "few samples": ({"n": 100, "correct": 90, "robust": 50}, {"n": 99, "correct": 90, "robust": 50}, "only 99 samples"),
    "the whole box": ({"eps": 0.5, "robust": 128}, {"eps": 0.5, "robust": 129},
                      "mid-grey… from every image, and still 129 of 1000 samples survive"),
    "half a wider box": ({"eps": 100.0, "width": 255.0}, {"eps": 127.5, "width": 255.0}, "mid-grey… from every image"),
    "another norm": ({"eps": 3.0, "norm": "l2"}, {"eps": 0.6}, "mid-grey… from every image"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDGES)
def test_a_doubt_is_raised_at_its_threshold_and_not_before(case: str) -> None:
    safe, beyond, text = EDGES[case]
    own = text.partition("…")[0]
    assert not [line for line in raised(**safe) if own in line]
    (line,) = [line for line in raised(**beyond) if own in line]
    assert text.replace("… ,", ",").replace("…", "") in line
    assert "\n" not in line


FACTS: dict[str, tuple[StageFacts, StageFacts, str]] = {
    "vanishing gradients": (white(gradients=100, zero_gradients=5), white(gradients=100, zero_gradients=6),
                            "vanish at 6%"),
    "a loss that did not rise": (white(searches=10, risen=5), white(searches=10, risen=4),
                                 "rose in only 40% of apgd-ce"),
    "an unused budget": (white(budget_rows=10, budget_used=5), white(budget_rows=10, budget_used=4.9),
                         "only 49% of eps"),
    "a spent budget": (white(), white(budget_spent=1), "budget was spent before apgd-ce ended"),
    "black beats white": (StageFacts("square", "score", 500, 9), StageFacts("square", "score", 500, 10),
                          "square, without gradients, broke 10 samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", FACTS)
def test_what_an_attack_saw_raises_a_doubt_at_its_threshold(case: str) -> None:
    safe, beyond, text = FACTS[case]
    assert raised(white(), safe) == []
    (line,) = raised(white(), beyond)
    assert text in line


def test_a_black_box_attack_alone_is_no_sign_of_masking() -> None:
    alone = StageFacts("square", "score", 900, 400, {"searches": 10, "risen": 0})
    assert raised(alone) == [], "nothing to compare it with, and its losses may fall"
    assert len(raised(alone, white())) == 1


def test_few_classes_are_told_of_the_targeted_attack_only() -> None:
    targeted = StageFacts("apgd-t", "white")
    few = {"classes": 3, "correct": 900}
    assert [line for line in raised(targeted, **few) if "not defined below 4" in line]
    assert raised(white(), **few) == []
    assert raised(targeted, classes=4) == []


def test_the_gravest_doubt_comes_first() -> None:
    lines = raised(white(gradients=1, zero_gradients=1), n=50, correct=3, robust=0, marginal=1)
    assert [
        part in line for part, line in zip(("chance", "vanish", "noise", "only 50"), lines, strict=True)
    ] == [True] * 4


# -- suites ---------------------------------------------------------------------------------------------------


def test_standard_is_autoattack_as_published() -> None:
    for norm in ("linf", "l2"):
        name, plan = stages("standard", norm)
        assert name == "standard"
        assert plan == [
            Stage("apgd-ce", {"steps": 100, "restarts": 1}),
            Stage("apgd-t", {"steps": 100, "n_targets": 9}),
            Stage("fab-t", {"steps": 100, "n_targets": 9}),
            Stage("square", {"queries": 5000}),
        ]


def test_standard_has_its_published_l1_form() -> None:
    plan = dict((stage.attack, stage.params) for stage in stages("standard", "l1")[1])  # noqa: C402
    assert list(plan) == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert plan["apgd-ce"] == {"steps": 100, "restarts": 5}
    assert plan["apgd-t"] == {"steps": 100, "n_targets": 5}
    assert (plan["fab-t"], plan["square"]) == ({"steps": 100, "n_targets": 9}, {"queries": 5000})


@pytest.mark.parametrize("suite", DESCRIPTIONS)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_every_stage_of_every_suite_is_an_attack_with_those_fields(suite: str, norm: str) -> None:
    for stage in stages(suite, norm)[1]:
        kind = get(stage.attack)
        assert norm in kind.norms
        kind(threat=Linf(0.1), until="broken", **stage.params)
    if suite == "rand":
        assert all(stage.params["copies"] == 20 for stage in stages(suite, norm)[1])


def test_names_make_a_suite_of_their_own() -> None:
    assert stages("pgd", "linf") == ("pgd", [Stage("pgd")])
    assert (
        stages("fgsm, pgd", "l2")
        == stages(["fgsm", "pgd"], "l2")
        == ("fgsm,pgd", [Stage("fgsm"), Stage("pgd")])
    )
    assert stages(["standard"], "linf") == stages("standard", "linf")


@pytest.mark.parametrize(
    ("suite", "norm", "error", "match"),
    [
        ("standart", "linf", UnknownName, "unknown suite or attack 'standart'; did you mean standard"),
        ("pdg", "linf", UnknownName, "pgd"),
        (["pgd", "squar"], "linf", UnknownName, "unknown attack 'squar'; did you mean square"),
        (["pgd", "standard"], "linf", UnknownName, "unknown attack 'standard'"),
        ("", "linf", UnknownName, "unknown suite or attack ''"),
        ([], "linf", RobustError, "names no attack"),
        ("standard", "l0", ThreatError, "no l0 form; it knows linf, l2, l1"),
    ],
)
def test_an_impossible_suite_is_one_line(suite: Any, norm: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match) as caught:
        stages(suite, norm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suite", ["quick", "standard", "rand"])
def test_an_oracle_is_refused_the_suites_that_need_gradients(suite: str) -> None:
    with pytest.raises(RobustError, match="use suite score"):
        stages(suite, "linf", black_box=True)
    assert stages("score", "linf", black_box=True)[0] == "score"


# -- oracles --------------------------------------------------------------------------------------------------


def test_an_oracles_verdict_is_of_its_answers_alone(tmp_path: Path) -> None:
    clf, x, y, _ = linear(n=8)
    oracle = Oracle(clf)
    verdict = evaluate(oracle, x, y, threat=Linf(0.3), suite="score", out=tmp_path / "run")
    assert verdict.suite == "score"
    assert verdict.broken_by == [None, None, *["square"] * 6]
    assert "only the oracle's answers were used" in verdict.warnings[0]
    assert verdict.manifest["model"]["oracle"]
    assert verdict.cost["queries"] == verdict.cost["forwards"] == oracle.cost.queries
    assert verdict.cost["backwards"] == 0
    assert verdict.manifest["stages"][0]["cost"]["queries"] == 8, "a query for each clean prediction"
    text = (tmp_path / "run" / "manifest.json").read_text() + repr(verdict) + json.dumps(verdict.summary())
    assert "standard" not in text
    with torch.no_grad():
        said = clf.module(verdict.adversarial).argmax(1)
    assert bool((said != y[verdict.adversarial_index]).all())
    for model in (oracle, clf, Oracle(clf)):
        assert Verdict.load(tmp_path / "run").verify(model, x, y)["examples"] == 6


def test_any_callable_is_an_oracle(tmp_path: Path) -> None:
    clf, x, y, _ = linear(n=6)

    def endpoint(points: Tensor) -> Tensor:
        with torch.no_grad():
            probabilities: Tensor = clf.module(points).softmax(1)
        return probabilities

    oracle = Oracle(endpoint)
    verdict = evaluate(oracle, x, y, threat=L2(2.0), suite=["square"], out=tmp_path / "run", report=False)
    assert verdict.robust_accuracy == 0
    assert (verdict.suite, verdict.manifest["model"]["digest"]) == ("square", "oracle:endpoint")
    assert verdict.cost["queries"] == oracle.cost.queries > 0
    assert verdict.cost["forwards"] == 0, "what the endpoint runs is not known"
    Verdict.load(tmp_path / "run").verify(Oracle(endpoint), x, y)
    with pytest.raises(VerificationError, match="the model is not the one"):
        Verdict.load(tmp_path / "run").verify(Oracle(endpoint, name="other"), x, y)
    with pytest.raises(VerificationError, match="clean sample"):
        Verdict.load(tmp_path / "run").verify(Oracle(lambda points: -endpoint(points), name="endpoint"), x, y)


@pytest.mark.parametrize("chunk", [3, 8])
def test_a_budget_is_kept_shared_out_and_its_end_doubted(chunk: int) -> None:
    clf, x, y, radius = linear(n=8, wrong=1)
    eps = between(radius, 0.5)
    oracle = Oracle(clf, budget=250)
    verdict = evaluate(oracle, x, y, threat=Linf(eps), suite="score", chunk=chunk)
    assert 150 < oracle.cost.queries <= 250
    assert verdict.cost["queries"] == oracle.cost.queries
    assert oracle.budget == 250, "the limits on its parts are gone"
    assert len(verdict) == 8
    assert any("the query budget was spent before square ended" in line for line in verdict.warnings)
    assert not bool((~verdict.robust & (radius > eps)).any())
    searched = [stage for stage in verdict.manifest["stages"] if stage["attack"] == "square"]
    assert searched[0]["attempted"] == 7, "no sample is left out for coming late"
    rich = evaluate(Oracle(clf, budget=10**6), x, y, threat=Linf(0.3), suite="score", chunk=chunk)
    assert not any("budget" in line for line in rich.warnings)
    assert rich.robust_accuracy == 0


def test_the_smallest_budget_still_gives_a_verdict() -> None:
    clf, x, y, _ = linear(n=8, wrong=1)
    oracle = Oracle(clf, budget=16)
    verdict = evaluate(oracle, x, y, threat=Linf(0.3), suite="score", chunk=3)
    assert verdict.clean_accuracy == 7 / 8
    assert verdict.robust_accuracy > 0.5, "only because nobody asked"
    assert any("budget was spent" in line for line in verdict.warnings)
    assert oracle.cost.queries <= 16


def test_an_oracle_answers_within_its_limits() -> None:
    clf, x, _, _ = linear(n=6)
    oracle = Oracle(clf, budget=10)
    with oracle.limit(4):
        with pytest.raises(BudgetExceeded):
            oracle.scores(x)
        oracle.scores(x[:4])
        assert oracle.left == 0
    assert oracle.left == 6
    assert oracle.known_classes == oracle.classes == 3
    with pytest.raises(ModelError, match="classes="):
        Oracle(clf.module, answers="labels").classes  # noqa: B018


# -- decisions ------------------------------------------------------------------------------------------------


def test_a_decision_tells_a_sure_outcome_from_a_firm_prediction() -> None:
    class Table(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)

    rows = torch.tensor([
        [3.0, 1.0, 0.0],  # right, clearly
        [3.0, 3.0 + 1e-6, 0.0],  # wrong by a hair
        [0.0, 3.0, 3.0 + 1e-6],  # wrong for sure, but which class?
        [torch.nan, 1.0, 0.0],
    ]).view(4, 3, 1, 1)  # fmt: skip
    clf = Classifier(Table(), bounds=(-10, 10))
    found = decide(clf, rows, torch.zeros(4, dtype=torch.long))
    assert found.hit.tolist() == [False, True, True, True]
    assert found.sure.tolist() == [True, False, True, True]
    assert found.prediction.tolist() == [0, 1, 2, -1]
    assert found.firm.tolist() == [True, False, False, True]
    assert found.confidence[3] == 0
    assert torch.allclose(found.confidence[:3], rows[:3, :, 0, 0].softmax(1).amax(1))
    answered = outcome(Oracle(clf), rows, torch.zeros(4, dtype=torch.long), torch.arange(4), 0)
    assert torch.equal(answered.hit, found.hit)
    assert torch.equal(answered.prediction, found.prediction)
