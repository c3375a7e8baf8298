"""`evaluate`: the worst case per sample, with evidence, whatever the data's form and size."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robust import L0, L2, Classifier, Linf, Oracle, Patch, Verdict, evaluate
from robust.attacks import REGISTRY
from robust.data.base import ArrayImages, Data
from robust.errors import RobustError
from robust.threat import SLACK, make_threat
from tests.robust.subjects import between, linear, network

COUNTS = ("forwards", "backwards", "queries")


def same_outcomes(first: Verdict, second: Verdict) -> bool:
    """Equal in everything per sample, the evidence bit for bit."""
    return (
        repr(first.samples) == repr(second.samples)  # repr, for NaN is not itself
        and torch.equal(first.adversarial_index, second.adversarial_index)
        and torch.equal(first.adversarial, second.adversarial)
    )


# -- outcomes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_linear_models_outcomes_are_the_closed_form(norm: str) -> None:
    clf, x, y, radius = linear(norm)
    radii = [between(radius, share) for share in (0.25, 0.5, 0.75)]
    threats = [make_threat(norm, eps) for eps in (radii[1], radii[2], radii[0])]
    verdict = evaluate(clf, x, y, threat=threats, suite="quick")
    falls = [min((eps for eps in radii if eps > r > 0), default=math.inf) for r in radius.tolist()]
    assert torch.equal(verdict.correct, radius > 0)
    assert verdict.eps_broken.tolist() == falls
    assert torch.equal(verdict.robust, radius > radii[2])
    assert verdict.curve == [(eps, int((radius > eps).sum()) / len(x)) for eps in radii]
    assert verdict.clean_accuracy == (len(x) - 2) / len(x)
    assert verdict.robust_accuracy == verdict.curve[-1][1]
    broken = torch.tensor([name is not None for name in verdict.broken_by])
    assert bool((verdict.distance[broken] >= radius[broken] * (1 - 1e-6)).all()), "nearer than the boundary"
    assert bool((verdict.distance[broken] <= verdict.eps_broken[broken] + SLACK).all())
    assert bool(verdict.distance[~broken].isnan().all())


def test_the_evidence_is_inside_the_ball_and_the_box_and_misclassified() -> None:
    clf, x, y = network(seed=2)
    verdict = evaluate(clf, x, y, threat=[Linf(0.02), Linf(0.04)], suite=["fgsm", "apgd-t"])
    index, points = verdict.adversarial_index, verdict.adversarial.double()
    assert len(index) > 3
    assert points.shape == (len(index), *x.shape[1:])
    assert index.tolist() == [i for i, name in enumerate(verdict.broken_by) if name is not None]
    distance = (points - x[index].double()).flatten(1).abs().amax(1)
    assert bool((distance <= verdict.eps_broken[index] + SLACK).all())
    assert torch.equal(distance, verdict.distance[index])
    assert float(points.min()) >= 0
    assert float(points.max()) <= 1
    with torch.no_grad():
        said = clf.module(verdict.adversarial).argmax(1)
    assert bool((said != y[index]).all())
    assert torch.equal(said, verdict.adversarial_predictions[index])
    whole = verdict.points(x)
    assert torch.equal(whole[index], verdict.adversarial)
    kept = [i for i in range(len(x)) if i not in index.tolist()]
    assert torch.equal(whole[kept], x[kept])


def test_broken_by_is_the_first_attack_of_the_suite_that_breaks_the_sample() -> None:
    clf, x, y = network(seed=2)
    suite = ["fgsm", "apgd-ce", "apgd-t"]
    alone = [evaluate(clf, x, y, threat=Linf(0.04), suite=[name]) for name in suite]
    expected = [
        next((name for name, one in zip(suite, alone, strict=True) if not one.robust[i]), None)
        if right
        else None
        for i, right in enumerate(alone[0].correct.tolist())
    ]
    together = evaluate(clf, x, y, threat=Linf(0.04), suite=suite)
    assert together.broken_by == expected
    assert len(set(expected)) > 2, "a case in which the attacks differ"
    worst = torch.stack([one.robust for one in alone]).all(0)
    assert torch.equal(together.robust, worst)


def test_a_curve_is_monotone_and_made_of_separate_runs() -> None:
    clf, x, y = network(seed=1)
    radii = [0.01, 0.02, 0.04, 0.08]
    curve = evaluate(clf, x, y, threat=[Linf(eps) for eps in radii], suite=["pgd"])
    heights = [height for _, height in curve.curve]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == len(radii), "a curve that falls at every radius"
    for eps, height in curve.curve:
        alone = evaluate(clf, x, y, threat=Linf(eps), suite=["pgd"])
        assert torch.equal(alone.robust, curve.correct & (curve.eps_broken > eps)), eps
        assert alone.robust_accuracy == height
    assert curve.threat == Linf(0.08)


def test_outcomes_depend_on_the_seed_alone_and_not_on_the_chunk() -> None:
    clf, x, y = network(seed=2)
    first, again, small = (
        evaluate(clf, x, y, threat=Linf(0.03), suite=["pgd"], seed=3, chunk=chunk)
        for chunk in (None, None, 5)
    )
    assert same_outcomes(first, again)
    assert first.broken_by == small.broken_by
    assert torch.equal(first.clean_predictions, small.clean_predictions)
    other = evaluate(clf, x, y, threat=Linf(0.03), suite=["pgd"], seed=4)
    assert not torch.equal(first.adversarial, other.adversarial)


def test_the_verdict_has_the_contracts_fields(tmp_path: Path) -> None:
    clf, x, y = network()
    verdict = evaluate(
        clf, x, y, threat=Linf(8 / 255), suite="quick", seed=7, out=tmp_path / "run", report=False
    )
    n = len(x)
    assert isinstance(verdict, Verdict)
    assert len(verdict) == n
    for value in (verdict.clean_accuracy, verdict.robust_accuracy):
        assert isinstance(value, float)
        assert 0 <= value <= 1
    for name, dtype in {
        "correct": torch.bool, "robust": torch.bool, "marginal": torch.bool, "labels": torch.int64,
        "clean_predictions": torch.int64, "adversarial_predictions": torch.int64,
        "distance": torch.float64, "eps_broken": torch.float64,
    }.items():  # fmt: skip
        value = getattr(verdict, name)
        assert value.shape == (n,), name
        assert value.dtype == dtype, name
    assert torch.equal(verdict.labels, y)
    assert not bool((verdict.robust & ~verdict.correct).any())
    assert verdict.threat == Linf(8 / 255)
    assert verdict.curve == [(8 / 255, verdict.robust_accuracy)]
    assert verdict.suite == "quick"
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest == verdict.manifest
    assert manifest["model"]["digest"] == clf.digest()
    assert manifest["threat"] == {"norm": "linf", "eps": [8 / 255]}
    assert [stage["attack"] for stage in manifest["suite"]["stages"]] == ["apgd-ce", "apgd-t"]
    assert (manifest["seed"], manifest["draws"], manifest["precision"]) == (7, 1, "original")
    assert {"schema", "data", "versions", "device", "batches", "command", "started", "finished"} < set(
        manifest
    )
    assert manifest["results"]["robust_accuracy"] == verdict.robust_accuracy
    assert verdict.warnings == manifest["warnings"]
    assert verdict.summary()["n"] == n
    json.dumps(verdict.summary())


def test_an_attacks_claims_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REGISTRY._table, "liar", "tests.robust.subjects:Liar")
    clf, x, y, radius = linear(n=18)
    eps = between(radius, 0.8)
    verdict = evaluate(clf, x, y, threat=Linf(eps), suite=["liar", "apgd-t"])
    honest = evaluate(clf, x, y, threat=Linf(eps), suite=["apgd-t"])
    assert torch.equal(verdict.robust, honest.robust)
    right = verdict.correct.nonzero()[:, 0].tolist()
    liars = [right[k] for k in range(3, len(right), 4) if not honest.robust[right[k]]]
    assert [i for i, name in enumerate(verdict.broken_by) if name == "liar"] == liars
    assert len(liars) > 1


# -- data -----------------------------------------------------------------------------------------------------


class Batches:
    """Data that notes every batch it is asked for."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y
        self.asked: list[list[int]] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Source`."""
        self.asked.append(list(rows))
        return self.x[list(rows)], self.y[list(rows)]


def test_tensors_datasets_lists_and_data_give_the_same_verdict() -> None:
    clf, x, y = network(n=6)
    data = Data("six", ("a", "b", "c", "d"), ArrayImages(x.numpy()), y)
    numbers = [(np.asarray(x[i]), np.int64(y[i])) for i in range(6)]
    forms: list[tuple[Any, ...]] = [
        (x, y),
        (x.double(), y.int()),
        (TensorDataset(x, y),),
        (numbers,),
        (data,),
    ]
    verdicts = [evaluate(clf, *form, threat=Linf(0.04), suite=["fgsm"]) for form in forms]
    assert verdicts[0].adversarial_index.tolist()
    assert all(same_outcomes(verdicts[0], other) for other in verdicts[1:])
    assert verdicts[-1].manifest["data"]["name"] == "six"
    assert verdicts[-1].manifest["data"]["classes"] == ["a", "b", "c", "d"]


def test_data_is_read_a_chunk_at_a_time() -> None:
    clf, x, y = network(n=50)
    data = Batches(x, y)
    evaluate(clf, data, threat=[Linf(0.01), Linf(0.02)], suite=["fgsm"], chunk=20)
    assert data.asked[0] == list(range(16)), "a first look"
    chunks = [rows for rows in data.asked[1:] if len(rows) > 1]
    assert chunks == [list(range(20)), list(range(20, 40)), list(range(40, 50))]
    assert sum(map(len, data.asked)) <= 50 + 16 + 1


# -- cost -----------------------------------------------------------------------------------------------------


def test_the_cost_is_the_sum_of_the_stages_and_what_the_module_was_asked() -> None:
    clf, x, y = network(seed=2, n=4)  # four rows fill a batch, so that there is no padding
    seen = []
    clf.module.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    verdict = evaluate(clf, x, y, threat=Linf(1e-4), suite=["fgsm", "pgd"])
    for name in COUNTS:
        assert verdict.cost[name] == sum(stage["cost"][name] for stage in verdict.manifest["stages"])
    self_check = 2 * 4 + 1  # two looks at its first points, and the measure of its footprint
    one_is_wrong = 3  # and is not attacked: its three batch mates are padded with one of them
    passes = {"fgsm": 1, "pgd": 20}
    clean, check = (
        4,
        one_is_wrong,
    )  # before the suite; each attack's own look at its points, and its last word
    expected = {name: check + one_is_wrong * (steps + 1) + check for name, steps in passes.items()}
    assert verdict.cost["backwards"] == one_is_wrong * sum(passes.values())
    assert verdict.cost["forwards"] == clean + sum(expected.values())
    padding = sum(seen) - self_check - verdict.cost["forwards"]
    assert padding == sum(steps + 1 for steps in passes.values())
    assert verdict.cost["seconds"] > 0


def test_queries_of_a_black_box_attack_are_counted() -> None:
    clf, x, y, _ = linear(n=6)
    verdict = evaluate(clf, x, y, threat=Linf(0.3), suite=["square"])
    assert verdict.robust_accuracy == 0
    assert 4 <= verdict.cost["queries"] <= verdict.cost["forwards"]
    assert verdict.cost["backwards"] == 0


# -- the model and the folder ---------------------------------------------------------------------------------


def test_the_model_is_left_as_it_was_found() -> None:
    clf, x, y = network(n=4)
    module = nn.Sequential(nn.BatchNorm2d(1), clf.module)
    module.train()
    module[0].eval()
    module[1].conv.weight.grad = torch.full_like(module[1].conv.weight, 7.0)
    module[1].conv.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    evaluate(Classifier(module), x, y, threat=Linf(0.02), suite=["fgsm"])
    assert [part.training for part in (module, module[0], module[1])] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert float(module[1].conv.weight.grad.min()) == 7
    assert not module[1].conv.bias.requires_grad
    assert module[1].conv.weight.requires_grad


def test_progress_rises_to_one_and_names_the_attack() -> None:
    clf, x, y = network(n=10)
    told: list[tuple[float, str]] = []
    evaluate(clf, x, y, threat=[Linf(0.01), Linf(0.02)], suite=["fgsm", "pgd"], chunk=4,
             progress=lambda fraction, text: told.append((fraction, text)))  # fmt: skip
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1
    assert any(text.startswith("pgd") for _, text in told)


def test_a_folder_holds_the_evidence_and_nothing_of_the_work(tmp_path: Path) -> None:
    clf, x, y = network(n=5, seed=2)
    folder = tmp_path / "deep" / "run"
    verdict = evaluate(clf, x, y, threat=Linf(0.06), suite=["fgsm"], out=folder)
    files = {"adversarial.safetensors", "digests.json", "manifest.json", "report.html", "samples.jsonl"}
    assert {path.name for path in folder.iterdir()} == files
    assert set(json.loads((folder / "digests.json").read_text())) == files - {"digests.json"}
    assert same_outcomes(verdict, Verdict.load(folder))
    assert same_outcomes(verdict, evaluate(clf, x, y, threat=Linf(0.06), suite=["fgsm"]))
    empty = tmp_path / "empty"
    empty.mkdir()
    evaluate(clf, x, y, threat=Linf(0.06), suite=["fgsm"], out=empty, report=False)
    assert {path.name for path in empty.iterdir()} == files - {"report.html"}


def complaint(subject: tuple[Any, ...], **options: Any) -> str:
    """The one line that a bad call gives."""
    with pytest.raises(RobustError) as caught:
        evaluate(*subject, threat=Linf(0.1), suite="fgsm", **options)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 400
    return line


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    subject = network(n=4)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for resume in (False, True):
        for out in (taken, tmp_path / "file", tmp_path / "file" / "run"):
            assert str(out) in complaint(subject, out=out, resume=resume)
    assert [path.name for path in taken.iterdir()] == ["thesis.tex"]
    done = tmp_path / "done"
    evaluate(*subject, threat=Linf(0.1), suite="fgsm", out=done, report=False)
    before = (done / "manifest.json").read_bytes()
    assert "holds something" in complaint(subject, out=done)
    assert (done / "manifest.json").read_bytes() == before


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "above the box": ({"x": "high"}, r"outside the box \[0\.0, 1\.0\]"),
    "NaN": ({"x": "nan"}, "NaN"),
    "bytes": ({"x": "bytes"}, "uint8.*255"),
    "vectors": ({"x": "flat"}, "images"),
    "too small for the model": ({"x": "small"}, "fails on inputs of shape"),
    "no sample": ({"x": "none"}, "empty"),
    "labels missing": ({"y": None}, "labels are missing"),
    "labels too many": ({"y": "long"}, r"\(12,\)|\(4,\)"),
    "labels as floats": ({"y": "float"}, "integer classes"),
    "a class too high": ({"y": "high"}, "class 4, the model has 4"),
    "a negative class": ({"y": "negative"}, "class -1"),
    "no threat": ({"threat": []}, "one threat, or several of one norm"),
    "two norms": ({"threat": [Linf(0.1), L2(0.1)]}, "of one norm"),
    "eps twice": ({"threat": [Linf(0.1), Linf(0.1)]}, "twice"),
    "unbounded": ({"threat": L2()}, "finite eps"),
    "eps per sample": ({"threat": Linf(torch.full((12,), 0.1))}, "one eps for all"),
    "a forgotten division": ({"threat": Linf(8)}, "8/255"),
    "a patch": ({"threat": Patch()}, "patch"),
    "an unknown suite": ({"suite": "standart"}, "standard"),
    "an unknown attack": ({"suite": ["pgd", "pdg"]}, "pgd"),
    "no attack": ({"suite": []}, "names no attack"),
    "no such form": ({"suite": "square", "threat": L0(2)}, "no l0 form"),
    "a chunk of nothing": ({"chunk": 0}, "chunk=0"),
    "a bare module": ({"model": "module"}, "Classifier"),
    "gradients of an oracle": ({"model": "oracle"}, "gradients"),
    "an oracle and a standard suite": ({"model": "oracle", "suite": "standard"}, "suite score"),
    "labels without classes": ({"model": "labels", "suite": "square"}, "classes="),
    "too small a budget": ({"model": "poor", "suite": "square"}, "23 left, but 12 samples need 24"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_writes_nothing(case: str, tmp_path: Path) -> None:
    clf, x, y = network(n=12)
    late_high, late_nan, late_class = x.clone(), x.clone(), y.clone()
    late_high[-1, 0, 0, 0], late_nan[-1, 0, 0, 0], late_class[-1] = 1.5, math.nan, 4
    negative = y.clone()
    negative[-1] = -1
    values: dict[str, dict[Any, Any]] = {
        "x": {"high": late_high, "nan": late_nan, "bytes": (x * 255).byte(), "flat": x.flatten(1),
              "small": x[..., :3], "none": x[:0]},
        "y": {"long": torch.cat([y, y[:1]]), "float": y.float(), "high": late_class, "negative": negative, None: None},
        "model": {"module": clf.module, "oracle": Oracle(clf), "labels": Oracle(clf.module, answers="labels"),
                  "poor": Oracle(clf, budget=23)},
    }  # fmt: skip
    change, match = BAD[case]
    given = {name: values[name][value] if name in values else value for name, value in change.items()}
    call = {"model": clf, "x": x, "y": y, "threat": Linf(0.1), "suite": ["fgsm"], **given}
    out = tmp_path / "run"
    with pytest.raises(RobustError, match=match) as caught:
        evaluate(call.pop("model"), call.pop("x"), call.pop("y"), out=out, **call)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert not clf.module.training
