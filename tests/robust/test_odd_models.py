"""Odd models and odd data: each has a clear outcome, and where a number could mislead, a doubt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust import Classifier, Linf, Verdict, evaluate
from robust.decide import DRAWS
from robust.errors import RobustError
from tests.robust.subjects import Subject, between, linear, network


class Wrapped(nn.Module):
    """A model with something done to its inputs or outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.inner(x)
        return logits


class NanWhereBright(Wrapped):
    """NaN on images whose first pixel is above 0.6."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits or NaN."""
        return torch.where((x[:, 0, 0, :1] > 0.6), torch.nan, super().forward(x))


class Flips(Wrapped):
    """Reverses the order of the classes at random, with the given probability."""

    def __init__(self, inner: nn.Module, probability: float) -> None:
        super().__init__(inner)
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or their mirror image."""
        logits = super().forward(x)
        return torch.where(torch.rand(len(x), 1) < self.probability, logits.flip(1), logits)


class Noisy(Wrapped):
    """Gaussian noise on the inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a noisy copy."""
        return super().forward(x + 1e-3 * torch.randn_like(x))


class Rounded(Wrapped):
    """Inputs rounded to eighths, which hides the gradient."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the rounded image."""
        return super().forward((x * 8).round() / 8)


def doubts(verdict: Verdict, text: str) -> list[str]:
    """The verdict's warnings that say `text`."""
    return [line for line in verdict.warnings if text in line]


def replaced(subject: Subject, module: nn.Module) -> Classifier:
    """The module in the place of the subject's own."""
    return Classifier(module.eval())


# -- shapes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes_have_exact_outcomes_under_every_attack(classes: int) -> None:
    clf, x, y, radius = linear(classes=classes, n=8, wrong=1)
    eps = between(radius, 0.5)
    for attack in ("apgd-t", "fab-t", "apgd-dlr"):
        verdict = evaluate(clf, x, y, threat=Linf(eps), suite=[attack])
        missed = verdict.robust & (radius <= eps)
        # Untargeted DLR follows one boundary at a time and may miss the nearest one; with two classes there is one.
        assert int(missed.sum()) <= (attack == "apgd-dlr" and classes > 2), attack
        assert not bool((~verdict.robust & (radius > eps)).any()), attack
        assert bool(doubts(verdict, f"{classes} classes")) == (attack == "apgd-t" and classes < 4)
        assert verdict.manifest["model"]["classes"] == classes


@pytest.mark.parametrize("shape", [(1, 3, 7), (3, 6, 2), (2, 1, 9), (1, 1, 4)])
def test_any_channels_and_sides(shape: tuple[int, int, int], tmp_path: Path) -> None:
    clf, x, y, radius = linear(shape=shape, n=6)
    eps = between(radius, 0.5)
    verdict = evaluate(clf, x, y, threat=Linf(eps), suite="quick", out=tmp_path / "run")
    assert torch.equal(verdict.robust, radius > eps)
    assert verdict.manifest["data"]["shape"] == list(shape)
    assert Verdict.load(tmp_path / "run").verify(clf, x, y)["examples"] == int(
        (verdict.correct & ~verdict.robust).sum()
    )
    strong = evaluate(clf, x, y, threat=Linf(0.3), suite="square")
    assert strong.broken_by == [None, None, *["square"] * 4]


def test_a_batch_of_one_is_as_in_company() -> None:
    clf, x, y, radius = linear(n=8)
    eps = between(radius, 0.5)
    together = evaluate(clf, x, y, threat=Linf(eps), suite="quick")
    kinds = set()
    for i in range(len(x)):
        alone = evaluate(clf, x[i : i + 1], y[i : i + 1], threat=Linf(eps), suite="quick")
        assert (alone.clean_accuracy, alone.robust_accuracy) == (float(radius[i] > 0), float(radius[i] > eps))
        assert alone.broken_by == [together.broken_by[i]]
        assert not doubts(alone, "at chance") or not alone.clean_accuracy
        kinds.add((alone.clean_accuracy, alone.robust_accuracy))
    assert kinds == {(0.0, 0.0), (1.0, 0.0), (1.0, 1.0)}


def test_all_misclassified_leaves_nothing_to_attack(tmp_path: Path) -> None:
    clf, x, y, _ = linear(n=8, wrong=8)
    verdict = evaluate(clf, x, y, threat=[Linf(0.1), Linf(0.2)], suite="standard", out=tmp_path / "run")
    assert (verdict.clean_accuracy, verdict.robust_accuracy) == (0, 0)
    assert verdict.broken_by == [None] * 8
    assert verdict.adversarial_index.tolist() == []
    assert torch.equal(verdict.points(x), x)
    assert (verdict.cost["forwards"], verdict.cost["backwards"], verdict.cost["queries"]) == (8, 0, 0)
    assert doubts(verdict, "at chance")
    found = Verdict.load(tmp_path / "run").verify(clf, x, y)
    assert found == {"samples": 8, "examples": 0, "marginal_differences": []}
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


# -- models that answer oddly ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (lambda x: torch.full((len(x), 3), torch.nan), "NaN or infinite logits on every input"),
        (lambda x: torch.zeros(len(x)), r"returned \(6,\); a classifier returns logits \(6, classes\)"),
        (lambda x: torch.zeros(len(x), 1), "one per class"),
        (lambda x: torch.zeros(1, 3), r"returned \(1, 3\)"),
        (lambda x: {"logits": x}, "returned dict"),
        (lambda x: x.flatten(1) @ torch.ones(5, 3), "fails on inputs of shape"),
    ],
)
def test_a_model_without_logits_is_refused_before_anything_is_written(
    answer: Any, match: str, tmp_path: Path
) -> None:
    module = nn.Module()
    module.forward = answer  # type: ignore[method-assign]
    _, x, y, _ = linear(n=6)
    with pytest.raises(RobustError, match=match) as caught:
        evaluate(Classifier(module.eval()), x, y, threat=Linf(0.1), suite="quick", out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("first", [3, 18])
def test_nan_counts_as_misclassified_and_is_reported(first: int, tmp_path: Path) -> None:
    subject = linear(n=20, wrong=0)
    x = subject.x.clone()
    x[:, 0, 0, 0] = 0.45
    x[first, 0, 0, 0] = 0.61  # NaN from the start
    y = subject.clf.logits(x).argmax(1)
    clf = replaced(subject, NanWhereBright(subject.clf.module))
    verdict = evaluate(clf, x, y, threat=Linf(0.16), suite=["pgd"], out=tmp_path / "run")
    assert verdict.correct.tolist() == [i != first for i in range(20)]
    assert verdict.clean_predictions[first] == -1
    assert verdict.samples.confidence[first] == 0
    assert len(doubts(verdict, "NaN or infinite logits on 1 of 20 clean samples")) == 1
    # An attack that makes the model answer NaN has broken it.
    assert -1 in verdict.adversarial_predictions[verdict.adversarial_index].tolist()
    assert Verdict.load(tmp_path / "run").verify(clf, x, y)["samples"] == 20


def test_a_softmax_model_is_measured_and_doubted() -> None:
    subject = linear(n=8)
    eps = between(subject.radius, 0.5)
    clf = replaced(subject, nn.Sequential(subject.clf.module, nn.Softmax(1)))
    verdict = evaluate(clf, subject.x, subject.y, threat=Linf(eps), suite="quick")
    assert len(doubts(verdict, "probabilities; return logits")) == 1
    assert torch.equal(verdict.robust, subject.radius > eps)
    assert not doubts(evaluate(*subject[:3], threat=Linf(eps), suite=["fgsm"]), "probabilities")


def test_a_model_in_train_mode_is_evaluated_in_eval_mode_and_put_back() -> None:
    subject = linear(n=8)
    module = nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Dropout(0.9), subject.clf.module)
    eps = between(subject.radius, 0.5)
    quiet = evaluate(Classifier(module.eval()), subject.x, subject.y, threat=Linf(eps), suite="quick")
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    verdict = evaluate(Classifier(module), subject.x, subject.y, threat=Linf(eps), suite="quick")
    assert len(doubts(verdict, "train mode")) == 1
    assert not doubts(quiet, "train mode")
    assert torch.equal(verdict.adversarial, quiet.adversarial)
    assert torch.equal(verdict.robust, subject.radius > eps)
    assert all(part.training for part in (module, module[0], module[1]))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# -- randomised models ----------------------------------------------------------------------------------------


def test_a_randomised_models_outcome_is_the_majority_over_keyed_draws(tmp_path: Path) -> None:
    subject = linear(classes=2, n=40, wrong=0)
    for probability, correct in ((0.15, 1.0), (0.85, 0.0)):
        clf = replaced(subject, Flips(subject.clf.module, probability))
        verdict = evaluate(clf, subject.x, subject.y, threat=Linf(1e-6), suite=["fgsm"])
        assert verdict.clean_accuracy == correct, "single forwards are wrong on 15 % or 85 % of these samples"
        assert verdict.manifest["draws"] == DRAWS == 25
        assert verdict.manifest["model"]["randomised"]
        assert doubts(verdict, "randomised, but suite fgsm")


def test_suite_rand_finds_the_boundary_of_a_noisy_model_and_repeats_itself(tmp_path: Path) -> None:
    subject = linear(classes=2, n=4, wrong=1)
    clf = replaced(subject, Noisy(subject.clf.module))
    outcomes = []
    for state in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(state)
            before = torch.random.get_rng_state()
            call: dict[str, Any] = {
                "threat": Linf(0.25),
                "suite": "rand",
                "out": tmp_path / str(state),
                "report": False,
            }
            verdict = evaluate(Classifier(clf.module), subject.x, subject.y, **call)
            outcomes.append((repr(verdict.samples), verdict.adversarial.tolist()))
            found = Verdict.load(tmp_path / str(state)).verify(clf, subject.x, subject.y)
            assert torch.equal(torch.random.get_rng_state(), before), "the caller's generator is left alone"
        assert found["marginal_differences"] == []
    assert outcomes[0] == outcomes[1], "a verdict depends on its seed and on nothing else"
    assert verdict.robust_accuracy == 0
    assert verdict.broken_by == [None, *["apgd-ce"] * 3]
    assert verdict.suite == "rand"
    assert verdict.manifest["draws"] == 25
    assert verdict.manifest["suite"]["stages"][0]["copies"] == 20
    assert not doubts(verdict, "randomised, but")


# -- numbers that could mislead -------------------------------------------------------------------------------


def test_a_model_at_chance_is_doubted() -> None:
    subject = linear(classes=4, n=60, wrong=0)
    shuffled = torch.arange(60) % 4
    verdict = evaluate(subject.clf, subject.x, shuffled, threat=Linf(0.01), suite=["fgsm"])
    assert 0 < verdict.clean_accuracy < 0.37
    assert doubts(verdict, "at chance for 4 classes")
    assert not doubts(evaluate(*subject[:3], threat=Linf(0.01), suite=["fgsm"]), "at chance")


def test_a_hidden_gradient_is_doubted_and_square_goes_around_it() -> None:
    subject = linear(n=12)
    clf = replaced(subject, Rounded(subject.clf.module))
    y = clf.logits(subject.x).argmax(1)
    verdict = evaluate(clf, subject.x, y, threat=Linf(0.3), suite=["fgsm", "apgd-ce", "square"])
    assert doubts(verdict, "gradients vanish at 100% of the points apgd-ce")
    assert verdict.broken_by.count("square") > 6
    count = verdict.broken_by.count("square")
    assert doubts(
        verdict, f"square, without gradients, broke {count} samples that gradient attacks could not"
    )
    plain = evaluate(*subject[:3], threat=Linf(0.3), suite=["apgd-ce", "square"])
    assert not doubts(plain, "gradient")


def test_an_eps_that_covers_the_box_must_break_everything() -> None:
    subject = linear(n=30, wrong=0)
    verdict = evaluate(*subject[:3], threat=Linf(1.0), suite=["fgsm", "apgd-ce"])
    assert verdict.robust_accuracy == 0
    assert not doubts(verdict, "the attacks fail")
    assert float(verdict.adversarial.min()) >= 0
    assert float(verdict.adversarial.max()) <= 1
    clf = replaced(subject, Rounded(subject.clf.module))
    y = clf.logits(subject.x).argmax(1)
    hidden = evaluate(clf, subject.x, y, threat=Linf(1.0), suite=["fgsm"])
    assert hidden.robust_accuracy > 0.6
    assert doubts(hidden, "reaches mid-grey from every image")


def test_a_constant_model_is_robust_only_on_its_own_class() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(30, 4))
    nn.init.zeros_(module[1].weight)
    with torch.no_grad():
        module[1].bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    _, x, _ = network()
    y = torch.arange(len(x)) % 4
    verdict = evaluate(Classifier(module.eval()), x, y, threat=Linf(0.5), suite="quick")
    assert torch.equal(verdict.robust, y == 0)
    assert doubts(verdict, "at chance")
    assert doubts(verdict, "gradients vanish")
    assert not doubts(verdict, "the attacks fail"), "a quarter of the samples is chance"
