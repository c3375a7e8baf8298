"""Claims about surrogates: ensembles by their formulas, substitutes from counted queries, and who judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robust.attacks import PGD, Surrogate
from robust.attacks.transfer.ensembles import ensemble
from robust.attacks.transfer.pairs import queried_pairs, synthetic
from robust.attacks.transfer.substitutes import Lesson, distil, train_substitute, untrained
from robust.classifier import Classifier
from robust.errors import BudgetExceeded, DataError, ModelError, RobustError, ThreatError
from robust.oracle import Oracle
from robust.threat import L2, Linf
from tests.contracts.subjects import linear, small

QUICK = Lesson(epochs=40, batch_size=32, augment=False)


def members() -> tuple[list[Classifier], Tensor]:
    """Two small networks with normalisations of their own, and points."""
    torch.manual_seed(0)
    found = [
        Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval(), mean=mean, std=std)
        for mean, std in (((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)), (0.5, 0.25))
    ]
    return found, torch.rand(5, 3, 2, 2)


# -- ensembles --------------------------------------------------------------------------------------------------------


def test_an_ensemble_s_answers_are_the_papers_formulas() -> None:
    models, x = members()
    each = torch.stack([clf.logits(x) for clf in models])
    torch.testing.assert_close(ensemble(models, "logits").logits(x), each.mean(0))
    mean = each.softmax(2).mean(0)
    torch.testing.assert_close(ensemble(models, "probabilities").logits(x).exp(), mean)


@pytest.mark.parametrize("label", range(4))
def test_the_ensemble_in_loss_has_the_mean_of_the_members_cross_entropies_and_its_gradient(
    label: int,
) -> None:
    models, x = members()
    y = torch.full((5,), label)
    found = []
    for pick in (0, 1):
        point = x.clone().requires_grad_()
        fused = F.cross_entropy(ensemble(models, "loss")(point), y, reduction="none")
        mean = torch.stack([F.cross_entropy(clf(point), y, reduction="none") for clf in models]).mean(0)
        value = (fused, mean)[pick]
        found.append((value.detach(), *torch.autograd.grad(value.sum(), point)))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_members_that_do_not_fit_are_refused_in_one_line() -> None:
    models, x = members()
    wide = Classifier(models[0].module, bounds=(0, 255))
    with pytest.raises(ModelError, match="give models of one box"):
        ensemble([models[0], wide])
    with pytest.raises(RobustError, match="use logits, probabilities, loss"):
        ensemble(models, "votes")  # type: ignore[arg-type]
    with pytest.raises(RobustError, match="at least one"):
        ensemble([])
    assert ensemble(models[:1]) is models[0]
    other = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval())
    other.logits(x), models[0].logits(x)
    with pytest.raises(ModelError, match="has 4 classes and Sequential 3"):
        ensemble([models[0], other])


# -- pairs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["scores", "labels"])
def test_pairs_cost_exactly_their_number_and_say_what_the_oracle_says(answers: Any) -> None:
    clf, _, _ = small()
    oracle = Oracle(clf, answers=answers, classes=5)
    pool = torch.rand(30, 1, 6, 7)
    pairs = queried_pairs(oracle, pool, 20, seed=3)
    assert oracle.cost.queries == 20 == len(pairs.x)
    assert len({tuple(point.flatten().tolist()) for point in pairs.x}) == 20, "each image is asked about once"
    assert all(bool((pool == point).all((1, 2, 3)).any()) for point in pairs.x)
    assert torch.equal(pairs.labels, clf.logits(pairs.x).argmax(1))
    if answers == "scores":
        torch.testing.assert_close(pairs.answers.exp(), clf.logits(pairs.x).softmax(1))
    again = queried_pairs(Oracle(clf, answers=answers, classes=5), pool, 20, seed=3)
    other = queried_pairs(Oracle(clf, answers=answers, classes=5), pool, 20, seed=4)
    assert torch.equal(pairs.x, again.x)
    assert not torch.equal(pairs.x, other.x)


def test_a_small_pool_is_followed_by_mixtures_of_two_of_its_images() -> None:
    clf, _, _ = small()
    pool = torch.zeros(2, 1, 6, 7)
    pool[1] = 0.8
    pairs = queried_pairs(Oracle(clf), pool, 50)
    assert len(pairs.x) == 50
    flat = pairs.x.flatten(1)
    assert bool((flat == flat[:, :1]).all())
    assert len(flat[:, 0].unique()) > 15
    assert float(flat.max()) <= 0.8 + 1e-6


def test_probabilities_and_their_logits_teach_the_same() -> None:
    clf, _, _ = small()
    pool = torch.rand(20, 1, 6, 7)
    logits = queried_pairs(Oracle(clf), pool, 10)
    told = queried_pairs(Oracle(lambda x: clf.logits(x).softmax(1)), pool, 10)
    torch.testing.assert_close(logits.answers, told.answers, rtol=1e-4, atol=1e-4)


def test_answers_that_are_no_numbers_are_paid_for_and_left_out() -> None:
    def backend(x: Tensor) -> Tensor:
        scores = x.flatten(1)[:, :3].clone()
        scores[::2] = torch.nan
        return scores

    oracle = Oracle(backend)
    pairs = queried_pairs(oracle, torch.rand(10, 1, 2, 2), 10)
    assert (len(pairs.x), oracle.cost.queries) == (5, 10)
    with pytest.raises(RobustError, match="no usable answer"):
        queried_pairs(Oracle(lambda x: torch.full((len(x), 3), torch.nan)), torch.rand(10, 1, 2, 2), 10)


@pytest.mark.parametrize("shape", [(1, 6, 7), (3, 32, 32), (1, 1, 1), (9,)])
def test_synthetic_images_lie_in_the_box_differ_and_do_not_depend_on_their_number(
    shape: tuple[int, ...],
) -> None:
    images = synthetic(12, shape, (-1.0, 3.0), seed=5)
    assert images.shape == (12, *shape)
    assert float(images.min()) >= -1
    assert float(images.max()) <= 3
    assert len({tuple(point.flatten().tolist()) for point in images}) == 12
    assert torch.equal(synthetic(7, shape, (-1.0, 3.0), seed=5), images[:7])


def test_pairs_that_cannot_be_asked_are_refused_before_any_query() -> None:
    clf, _, _ = small()
    pool = torch.rand(9, 1, 6, 7)
    oracle = Oracle(clf, budget=5)
    with pytest.raises(BudgetExceeded):
        queried_pairs(oracle, pool, 6)
    assert oracle.cost.queries == 0
    with pytest.raises(RobustError, match="queries=1 teach nothing"):
        queried_pairs(oracle, pool, 1)
    with pytest.raises(DataError, match="shape"):
        queried_pairs(oracle, None, 4)
    with pytest.raises(DataError, match="empty"):
        queried_pairs(oracle, pool[:0], 4)
    with pytest.raises(RobustError, match="pass classes="):
        queried_pairs(Oracle(clf.module, answers="labels"), pool, 4)


# -- substitutes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answers", ["scores", "labels"])
def test_a_substitute_agrees_with_the_model_that_it_never_saw_inside(answers: Any) -> None:
    clf, _, _ = small()
    pairs = queried_pairs(Oracle(clf, answers=answers, classes=5), torch.rand(600, 1, 6, 7), 600)
    copy = distil(pairs, lesson=QUICK)
    fresh = torch.rand(200, 1, 6, 7, generator=torch.Generator().manual_seed(9))
    same = (copy.logits(fresh).argmax(1) == clf.logits(fresh).argmax(1)).float().mean()
    assert float(same) > 0.8, "the commonest class alone is right in six of ten"
    assert copy.bounds == clf.bounds
    assert not copy.module.training


def test_a_substitute_is_a_function_of_its_seed() -> None:
    pairs = queried_pairs(Oracle(small()[0]), torch.rand(64, 1, 6, 7), 64)
    first, again, other = (distil(pairs, lesson=Lesson(epochs=2, seed=seed)).digest() for seed in (1, 1, 2))
    assert first == again != other


def test_a_substitute_learns_labelled_data_too() -> None:
    clf, _, _ = small(n=2)
    x = torch.rand(300, 1, 6, 7)
    y = clf.logits(x).argmax(1)
    found = train_substitute((x, y), lesson=QUICK)
    assert float((found.logits(x).argmax(1) == y).float().mean()) > 0.9


def test_the_architecture_follows_from_the_shape_or_is_named() -> None:
    def modules(shape: tuple[int, ...], **how: Any) -> list[str]:
        clf = untrained(shape, 4, Lesson(**how))
        assert clf.logits(torch.rand(2, *shape)).shape == (2, 4)
        return [type(part).__name__ for part in clf.module.modules()]

    assert modules((3, 32, 32)).count("Conv2d") == 3
    assert modules((1, 28, 28)).count("Conv2d") == 3
    assert modules((3, 100, 64)).count("Conv2d") == 4
    assert "Conv2d" not in modules((1, 8, 8))
    assert "Conv2d" not in modules((20,))
    assert "Conv2d" not in modules((3, 32, 32), architecture="mlp")
    assert "LeNet5" in modules((1, 28, 28), architecture="zoo:lenet5")


# -- the attack -------------------------------------------------------------------------------------------------------


def test_the_target_itself_as_surrogate_falls_to_what_the_inner_attack_breaks() -> None:
    clf, x, y = small()
    inner = PGD(threat=Linf(0.06), steps=10).run(clf, x, y, seed=4)
    found = Surrogate(threat=Linf(0.06), inner="pgd", models=(clf,)).run(clf, x, y, seed=4)
    assert torch.equal(found.success, inner.success)
    assert found.cost.queries == 2 * len(x), "the clean point and one other each"
    assert found.queries is not None
    assert found.queries.tolist() == [1] * len(x)


def test_a_broken_sample_is_asked_about_no_further() -> None:
    clf, x, y = small()
    attack = Surrogate(threat=Linf(0.3), inner="pgd,mifgsm,fgsm", models=(clf,), until="broken")
    found = attack.run(Oracle(clf), x, y)
    assert found.success.all()
    assert found.queries is not None
    assert found.queries[0] == 0, "it was wrong from the start"
    assert found.cost.queries == len(x) + int(found.queries.sum()) < 4 * len(x)


def test_the_surrogates_passes_are_noted_and_not_the_target_s() -> None:
    (clf, x, y), other = small(n=4), small()[0]
    found = Surrogate(threat=Linf(0.1), inner="mifgsm", steps=7, models=(other,)).run(clf, x, y)
    assert found.cost.backwards == 0
    assert found.notes["surrogate_backwards"] >= 4 * 7


@pytest.mark.parametrize("how", ["logits", "probabilities", "loss"])
def test_several_surrogates_work_together_on_labels_alone(how: Any) -> None:
    clf, x, y = small()
    noisy = []
    for k in range(3):
        module = small()[0].module
        with torch.no_grad():
            torch.manual_seed(k)
            for parameter in module.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        noisy.append(Classifier(module))
    oracle = Oracle(clf, answers="labels", classes=5)
    found = Surrogate(threat=Linf(0.2), inner="mifgsm", models=tuple(noisy), ensemble=how).run(oracle, x, y)
    assert float(found.success.float().mean()) > 0.8
    assert found.cost.queries == oracle.cost.queries == 2 * len(x)


def test_the_mask_holds_on_the_surrogate_as_well() -> None:
    clf, x, y = small()
    mask = torch.zeros(1, 1, 6, 7, dtype=torch.bool)
    mask[..., :3] = True
    result = Surrogate(threat=L2(2.0), inner="pgd", models=(clf,)).run(clf, x, y, mask=mask)
    assert torch.equal(result.x_adv[..., 3:], x[..., 3:])
    assert int(result.success.sum()) > 1


def test_prepared_once_it_asks_only_about_points_and_can_be_recalled() -> None:
    clf, x, y = small()
    pool = torch.rand(50, 1, 6, 7)
    attack = Surrogate(threat=Linf(0.06), inner="mifgsm", queries=80, epochs=5)
    oracle = Oracle(clf)
    assert attack.preparation() == 80
    ready = attack.prepare(oracle, pool, seed=2)
    assert oracle.cost.queries == 80
    assert ready.preparation() == 0
    found = ready.run(oracle, x, y, seed=2)
    assert oracle.cost.queries == 80 + 2 * len(x)
    again = attack.prepare(oracle, pool, seed=2, known=ready.learned())
    assert oracle.cost.queries == 80 + 2 * len(x), "what is known is not asked again"
    assert torch.equal(again.run(clf, x, y, seed=2).x_adv, found.x_adv)
    plain = PGD(threat=Linf(0.1))
    assert plain.prepare(clf, pool) is plain


def test_a_budget_that_a_substitute_would_exceed_is_refused_before_any_query() -> None:
    clf, x, y = small()
    oracle = Oracle(clf, budget=60)
    with pytest.raises(RobustError, match=r"60 left, but a substitute needs 100 .* give surrogate models"):
        Surrogate(threat=Linf(0.1), queries=100).run(oracle, x, y)
    assert oracle.cost.queries == 0
    short = Oracle(clf, budget=30)
    found = Surrogate(threat=Linf(0.001), inner="pgd,mifgsm,fgsm", models=(clf,)).run(short, x, y)
    assert found.notes["budget_spent"] == 1
    assert short.cost.queries <= 30


@pytest.mark.parametrize(
    ("fields", "kind", "line"),
    [
        ({"inner": "mifgms"}, RobustError, "did you mean mifgsm"),
        ({"inner": "square"}, RobustError, "use a white-box attack of a fixed budget"),
        ({"inner": "fmn"}, RobustError, "use a white-box attack of a fixed budget"),
        ({"inner": " "}, RobustError, "name an attack"),
        ({"steps": 0}, RobustError, "at least 1 step"),
        ({"inner": "fgsm", "threat": L2(1.0)}, ThreatError, "no l2 form"),
        ({"queries": 1}, RobustError, "queries=1"),
        ({"epochs": 0}, RobustError, "epochs=0"),
        ({"temperature": 0.0}, RobustError, "temperature=0.0"),
        ({"architecture": "zoo:resnet21"}, RobustError, "resnet20"),
        ({"models": ("zoo:nothing",)}, RobustError, "nothing"),
        ({"models": (linear()[0],)}, ModelError, "give one of the same box"),
        ({"models": (small(3)[0],)}, ModelError, "has 3 classes, the target 5"),
    ],
)
def test_what_cannot_be_crafted_is_one_line(fields: dict[str, Any], kind: type[Exception], line: str) -> None:
    clf, x, y = small(n=3)
    with pytest.raises(kind, match=line) as caught:
        Surrogate(**{"threat": Linf(0.1), **fields}).run(clf, x, y)
    assert "\n" not in str(caught.value)
