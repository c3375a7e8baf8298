"""What holds for every attack in the registry; a new row is tested here without a new file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust.attacks import REGISTRY, Attack, get
from robust.classifier import Classifier
from robust.errors import RobustError
from robust.oracle import Oracle
from robust.threat import Linf
from tests.contracts.subjects import RADII, cases, linear, make, optimum, small

CASES = cases()
MINIMUM = [(name, norm) for name, norm in CASES if get(name).minimum_norm]
BUDGETED = [(name, norm) for name, norm in CASES if not get(name).minimum_norm]
FIXED = pytest.mark.parametrize(("name", "norm"), BUDGETED)
EVERY = pytest.mark.parametrize(("name", "norm"), CASES)


@EVERY
def test_attack_stays_in_ball_and_box_and_reports_the_truth(name: str, norm: str) -> None:
    clf, x, y = small()
    result = make(name, norm).run(clf, x, y)
    threat = make(name, norm).threat
    assert result.x_adv.shape == x.shape
    assert result.x_adv.dtype == x.dtype
    assert bool(threat.inside(result.x_adv, x, clf.bounds).all())
    assert bool((result.success == (clf.logits(result.x_adv).argmax(1) != y)).all())
    assert bool(result.success[0]), "the point that was wrong from the start"
    assert torch.allclose(result.distance, threat.distance(result.x_adv, x))
    assert result.success.sum() > 1, "an attack that breaks nothing here is broken"


@EVERY
def test_attack_is_deterministic_and_independent_of_the_batch(name: str, norm: str) -> None:
    clf, x, y = small(n=6)
    attack = make(name, norm)
    together = attack.run(clf, x, y, seed=7)
    again = attack.run(clf, x, y, seed=7)
    assert torch.equal(together.x_adv, again.x_adv)
    if attack.universal:
        return  # the one change is learnt from whatever samples there are
    for i in range(len(x)):
        alone = attack.run(clf, x[i : i + 1], y[i : i + 1], seed=7, index=torch.tensor([i]))
        assert bool(alone.success[0]) == bool(together.success[i]), i


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("until", ["strongest", "broken"])
@EVERY
def test_attack_on_a_twin_keeps_the_contract(name: str, norm: str, until: str, precision: str) -> None:
    clf, x, y = small()
    attack = make(name, norm, until=until)
    result = attack.run(clf, x, y, seed=7, precision=precision)
    assert torch.equal(result.x_adv, attack.run(clf, x, y, seed=7, precision=precision).x_adv)
    assert bool(attack.threat.inside(result.x_adv, x, clf.bounds).all())
    assert bool((result.success == (clf.logits(result.x_adv).argmax(1) != y)).all())
    plain = attack.run(clf, x, y, seed=7, precision="original")
    assert int((plain.success & ~result.success).sum()) <= 1, "a twin is no excuse for finding less"
    assert clf.module.conv.weight.requires_grad


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        case
        for case in CASES
        if case[0] not in ("apgd-t", "fab-t", "autoattack") and not get(case[0]).universal
    ],
)
def test_attack_gives_the_same_bits_alone_and_in_a_batch_of_equal_shape(name: str, norm: str) -> None:
    clf, x, y = small(n=4)  # one job a sample: 1 and 4 samples run in the same padded batch
    attack = make(name, norm)
    together = attack(clf, x, y, seed=7)
    for i in range(len(x)):
        alone = attack(clf, x[i : i + 1], y[i : i + 1], seed=7, index=torch.tensor([i]))
        assert torch.equal(alone[0], together[i]), i


@EVERY
def test_attack_leaves_the_model_untouched(name: str, norm: str) -> None:
    clf, x, y = small(n=3)
    clf.module.train()
    clf.module.conv.weight.grad = torch.ones_like(clf.module.conv.weight)
    before = {key: value.clone() for key, value in clf.module.state_dict().items()}
    with pytest.warns(UserWarning, match="train mode"):
        make(name, norm).run(clf, x, y)
    assert all(torch.equal(before[key], value) for key, value in clf.module.state_dict().items())
    assert clf.module.training
    assert all(parameter.requires_grad for parameter in clf.module.parameters())
    assert bool((clf.module.conv.weight.grad == 1).all())
    assert clf.module.linear.weight.grad is None


@EVERY
def test_attack_does_not_change_its_inputs_and_takes_empty_batches(name: str, norm: str) -> None:
    clf, x, y = small(n=2)
    before = x.clone()
    make(name, norm)(clf, x, y)
    assert torch.equal(x, before)
    empty = make(name, norm).run(clf, x[:0], y[:0])
    assert empty.x_adv.shape == (0, *x.shape[1:])
    assert empty.success.shape == (0,)


@EVERY
def test_attack_keeps_the_dtype_and_stays_inside_after_rounding(name: str, norm: str) -> None:
    clf, x, y = small(n=4)
    x = x.to(torch.bfloat16)
    x_adv = make(name, norm)(clf, x, y)
    assert x_adv.dtype == torch.bfloat16
    assert bool(make(name, norm).threat.inside(x_adv, x, clf.bounds).all())


@pytest.mark.parametrize(
    ("name", "norm"), [case for case in CASES if case[1] != "patch"]
)  # whose eps stays 1
def test_attack_takes_one_eps_per_sample(name: str, norm: str) -> None:
    clf, x, y = small(n=6)
    eps = torch.tensor([0.2, 0.5, 1.0, 1.0, 2.0, 0.01]) * RADII[norm]
    if norm == "l0":
        eps = eps.ceil()
    result = make(name, norm, eps).run(clf, x, y)
    assert bool((result.distance <= eps + 1e-7).all())
    if get(name).universal:
        return  # alone it learns another change
    alone = make(name, norm, float(eps[4])).run(clf, x[4:5], y[4:5], index=torch.tensor([4]))
    assert bool(alone.success[0]) == bool(result.success[4])


@FIXED
def test_fixed_budget_attack_never_loses_to_the_clean_point(name: str, norm: str) -> None:
    clf, x, y = small()
    attack = make(name, norm, until="strongest")
    result = attack.run(clf, x, y)
    clean = clf.logits(x).argmax(1) != y
    assert bool((result.success | ~clean).all())
    if hasattr(attack, "loss") and attack.loss == "cross-entropy":
        loss = nn.functional.cross_entropy
        before, after = (
            loss(clf.logits(x), y, reduction="none"),
            loss(clf.logits(result.x_adv), y, reduction="none"),
        )
        assert bool((after >= before - 1e-6)[~result.success].all())


@FIXED
def test_stopping_when_broken_breaks_what_the_full_search_breaks(name: str, norm: str) -> None:
    clf, x, y = small()
    strongest = make(name, norm, until="strongest").run(clf, x, y)
    broken = make(name, norm, until="broken").run(clf, x, y)
    assert torch.equal(broken.success, strongest.success)
    assert broken.cost.forwards <= strongest.cost.forwards


@EVERY
def test_targeted_success_means_that_the_target_is_predicted(name: str, norm: str) -> None:
    clf, x, y = small()
    targets = (y + 2) % clf.classes
    attack, begin = make(name, norm, eps=None if norm == "l0" else 4 * RADII[norm]), None
    if attack.knowledge == "decision":  # labels alone lead to no class: such attacks are given a point of it
        begin = get("pgd")(threat=Linf(1.0), steps=20)(clf, x, y, targets=targets)
    result = attack.run(clf, x, y, targets=targets, begin=begin)
    assert bool((result.success == (clf.logits(result.x_adv).argmax(1) == targets)).all())
    if name not in ("fgsm", "fgm") and not attack.heuristic:
        assert result.success.any()


@pytest.mark.parametrize(
    ("name", "norm"),
    [case for case in MINIMUM if case[1] in ("linf", "l2", "l1") and not get(case[0]).heuristic],
)
def test_minimum_norm_attack_is_within_a_quarter_of_the_closed_form(name: str, norm: str) -> None:
    clf, x, y, weight, _ = linear()
    best = optimum(clf, x, y, weight, norm)
    kind = get(name)
    result = kind(threat=type(make(name, norm).threat)()).run(clf, x, y)
    assert bool(result.success.all())
    ratio = result.distance / best
    assert float(ratio.min()) > 1 - 1e-4, "nothing can beat the optimum"
    # Without gradients a search follows the boundary that it met first, which may not be the nearest class's.
    blind = kind.knowledge != "white"
    assert float(ratio.median() if blind else ratio.max()) < 1.25
    assert float(ratio.max()) < 2


@pytest.mark.parametrize(("name", "norm"), MINIMUM)
def test_minimum_norm_attack_returns_the_clean_point_where_it_fails(name: str, norm: str) -> None:
    clf, x, y = small()
    result = make(name, norm, eps=1e-4 * RADII[norm] if norm != "l0" else 1.0).run(clf, x, y)
    failed = ~result.success
    assert failed.any()
    assert torch.equal(result.x_adv[failed], x[failed])
    assert bool((result.distance[failed] == 0).all())


@pytest.mark.parametrize(("name", "norm"), [case for case in BUDGETED if case[1] in ("linf", "l2", "l1")])
def test_fixed_budget_attack_cannot_break_a_linear_model_within_its_margin(name: str, norm: str) -> None:
    clf, x, y, weight, _ = linear()
    best = optimum(clf, x, y, weight, norm)
    result = make(name, norm, 0.98 * best).run(clf, x, y)
    assert not result.success.any()


@pytest.mark.parametrize("name", ["pgd", "apgd-t", "apgd-dlr", "fab-t", "autoattack"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_strong_attack_breaks_a_linear_model_just_beyond_its_margin(name: str, norm: str) -> None:
    clf, x, y, weight, _ = linear()
    best = optimum(clf, x, y, weight, norm)
    fields: dict[str, Any] = {"steps": 60} if name != "autoattack" else {"version": "standard"}
    if "n_targets" in get(name).__dataclass_fields__:
        fields["n_targets"] = 9
    if name == "pgd":
        fields["loss"] = "margin"
    beyond = 1.15 if norm == "l1" else 1.1  # l1-APGD's sparse steps end a little away from the best corner
    result = make(name, norm, beyond * best, until="broken", **fields).run(clf, x, y)
    assert result.success.float().mean() >= (1.0 if name != "pgd" else 0.8)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_black_box_attack_takes_an_oracle_and_a_white_box_attack_refuses_it(name: str) -> None:
    clf, x, y = small(n=4)
    oracle = Oracle(clf)
    attack = make(name, "linf" if "linf" in get(name).norms else get(name).norms[0])
    if attack.knowledge == "white":
        with pytest.raises(RobustError, match="Oracle"):
            attack.run(oracle, x, y)
        return
    result = attack.run(oracle, x, y)
    assert result.cost.queries == oracle.cost.queries
    assert 0 < result.cost.queries <= 4 * (100 + 1)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_attack_says_what_is_wrong_in_one_line(name: str) -> None:
    clf, x, y = small(n=2)
    attack = make(name, get(name).norms[0])
    bad: list[tuple[Any, ...]] = [
        (clf.module, x, y),
        (clf, x, y[:1]),
        (clf, x, y.float()),
        (clf, x * 255, y),
        (clf, x, y - 9),
        (clf, (x * 255).byte(), y),
    ]
    for arguments in bad:
        with pytest.raises(RobustError) as caught:
            attack.run(*arguments)
        assert "\n" not in str(caught.value)
    if "linf" in attack.norms:
        with pytest.raises(RobustError, match="outside the box"):
            make(name, "linf", 8.0).run(clf, x, y)


@pytest.mark.parametrize("name", list(REGISTRY))
def test_attack_is_a_frozen_dataclass_with_config_and_card(name: str) -> None:
    attack = make(name, get(name).norms[0])
    same = make(name, get(name).norms[0])
    assert attack == same
    assert repr(attack) == repr(same)
    assert attack.config()["threat"]["norm"] == attack.threat.norm
    assert type(attack)(**{**attack.config(), "threat": attack.threat}) == attack
    with pytest.raises(AttributeError):
        attack.until = "broken"  # type: ignore[misc]
    assert "arXiv:" in (type(attack).__doc__ or "").splitlines()[0]
    assert isinstance(attack, Attack)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("name", list(REGISTRY))
def test_attack_works_on_few_classes(name: str, classes: int) -> None:
    clf, x, y = small(classes)
    norms = get(name).norms
    eps = 0.2 if "linf" in norms else None
    result = make(name, "linf" if "linf" in norms else norms[0], eps).run(clf, x, y)
    assert result.success.float().mean() > 0.4


def test_a_nan_output_inside_the_ball_counts_as_a_failure_of_the_model() -> None:
    class Fragile(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            total = x.flatten(1).sum(1)
            logits = torch.stack([total, 5 - total], 1)  # class 0 above 2.5, where the ball does not reach
            return torch.where(total[:, None] < 11, torch.nan, logits)

    x = torch.full((2, 1, 5, 5), 0.47)
    attack = get("apgd-ce")(threat=Linf(0.1), steps=10, until="broken")
    result = attack.run(Classifier(Fragile().eval()), x, torch.tensor([0, 0]))
    assert bool(result.success.all())
    assert not bool(result.x_adv.isnan().any())
