"""Models that hide their gradient: the verdict says so, and attacks that need no gradient break them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from robust import Classifier, Linf, Oracle, Verdict, evaluate, load_data, load_model
from robust.experiments.catalogue.masked import Rounds, Saturates

EPS = 0.25


@pytest.fixture(scope="module")
def subject() -> tuple[nn.Module, Tensor, Tensor]:
    """The shipped digits model without its normalisation, which is none, and samples."""
    clf = load_model("zoo:digits")
    assert float(clf.mean) == 0
    assert float(clf.std) == 1
    x, y = load_data("digits", n=16).tensors()
    return clf.module, x, y


def verdict_of(mask: type[nn.Module], suite: object, subject: tuple[nn.Module, Tensor, Tensor]) -> Verdict:
    """The verdict on a masked model."""
    module, x, y = subject
    return evaluate(Classifier(mask(module).eval()), x, y, threat=Linf(EPS), suite=suite)  # type: ignore[arg-type]


@pytest.mark.parametrize("mask", [Rounds, Saturates])
def test_plain_gradients_are_fooled_and_flagged_and_full_reports_the_lower_number(
    mask: type[nn.Module], subject: tuple[nn.Module, Tensor, Tensor]
) -> None:
    fooled = verdict_of(mask, "pgd", subject)
    assert any("gradients vanish" in line for line in fooled.warnings)
    honest = verdict_of(mask, "full", subject)
    assert honest.robust_accuracy < fooled.robust_accuracy - 0.3
    assert honest.robust_accuracy <= 0.1
    if mask is Rounds:
        assert any("without gradients" in line for line in honest.warnings)


@pytest.mark.parametrize("name", ["rays", "hopskipjump"])
@pytest.mark.parametrize("mask", [Rounds, Saturates])
def test_labels_alone_break_what_plain_gradients_do_not(
    mask: type[nn.Module], name: str, subject: tuple[nn.Module, Tensor, Tensor]
) -> None:
    verdict = verdict_of(mask, ["pgd", name], subject)
    by_labels = sum(broken == name for broken in verdict.broken_by)
    assert by_labels > 3
    assert any(f"{name}, without gradients, broke" in line for line in verdict.warnings)


@pytest.mark.parametrize("mask", [Rounds, Saturates])
def test_points_of_a_substitute_break_what_plain_gradients_do_not(
    mask: type[nn.Module], subject: tuple[nn.Module, Tensor, Tensor]
) -> None:
    verdict = verdict_of(mask, ["pgd", "surrogate"], subject)
    by_transfer = sum(broken == "surrogate" for broken in verdict.broken_by)
    assert by_transfer > 8
    assert any("surrogate, with other models' gradients, broke" in line for line in verdict.warnings)
    alone = verdict_of(mask, "transfer", subject)
    assert alone.robust_accuracy < 0.4
    assert not any("broke" in line for line in alone.warnings), "there is nothing to compare it with"
    learnt = [stage for stage in alone.manifest["stages"] if stage["attack"] == "prepare"]
    assert [stage["cost"]["queries"] for stage in learnt] == [2000]


def test_an_oracle_of_labels_gets_a_verdict_by_the_suite_decision(
    subject: tuple[nn.Module, Tensor, Tensor],
) -> None:
    module, x, y = subject
    oracle = Oracle(Classifier(module), answers="labels", classes=10)
    verdict = evaluate(oracle, x[:6], y[:6], threat=Linf(EPS), suite="decision")
    assert verdict.suite == "decision"
    assert verdict.robust_accuracy == 0
    assert set(verdict.broken_by) <= {"rays", "hopskipjump"}
    assert verdict.cost["queries"] == oracle.cost.queries
    points = torch.as_tensor(verdict.points(x[:6]))
    assert bool((oracle.labels(points) != y[:6]).all())
