"""A defended model is attacked as it declares, beside what an attack that does not know of it would have claimed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from robust import L2, Linf, Verdict, evaluate
from robust.adaptive import EOT, KINDS, adapted, run_unaware
from robust.attacks import get as get_attack
from robust.cli.main import run
from robust.decide import decide
from robust.defense import Defended, Defense
from robust.defenses import get
from robust.doubts import raise_doubts
from robust.errors import RunError, VerificationError
from robust.suites import Stage, stages
from tests.robust.commands import Command
from tests.robust.crash import facts
from tests.robust.forger import Forger
from tests.robust.subjects import network

N = 16
EPS = 0.1


def rounded(n: int = N, bits: int = 3) -> tuple[Defended, Tensor, Tensor]:
    """A network behind rounding, and samples that both classify alike."""
    clf, x, _ = network(n=n)
    defended = get("bit-depth")(bits=bits)(clf)
    return defended, x, defended.logits(x).argmax(1)


@pytest.fixture(scope="module")
def shattered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a verdict on `rounded`."""
    out = tmp_path_factory.mktemp("defended") / "run"
    evaluate(*rounded(), threat=[Linf(EPS / 2), Linf(EPS)], suite="quick", chunk=8, out=out)
    return out


# -- what is measured -------------------------------------------------------------------------------------------


def test_a_shattered_gradient_is_credited_with_nothing(shattered: Path) -> None:
    verdict = Verdict.load(shattered)
    beside = verdict.non_adaptive
    assert beside is not None
    assert verdict.clean_accuracy == 1
    defended, x, y = rounded()
    plain = evaluate(defended.undefended, x, y, threat=Linf(EPS), suite="quick")
    assert verdict.robust_accuracy <= plain.robust_accuracy + 1 / N
    assert beside["overstated"] >= 0.3, "no gradient: PGD is a random start and nothing else"
    assert beside["claimed"] == max(beside["naive"], beside["replay"])
    assert beside["overstated"] == beside["claimed"] - verdict.robust_accuracy
    assert verdict.summary()["non_adaptive"] == verdict.manifest["results"]["non_adaptive"] == beside
    assert verdict.manifest["defenses"] == [get("bit-depth")(bits=3).describe()]


def test_the_non_adaptive_numbers_are_the_attacks_own(shattered: Path) -> None:
    verdict, (defended, x, y) = Verdict.load(shattered), rounded()
    beside = verdict.non_adaptive
    assert beside is not None
    for kind in KINDS:
        correct = []
        for rows in torch.arange(N).split(8):
            found = run_unaware(
                kind, defended, Linf(EPS), x[rows], y[rows], seed=0, index=rows, precision="original"
            )
            correct += (defended.logits(found.x_adv).argmax(1) == y[rows]).tolist()
        assert beside[kind] == sum(correct) / N, kind


def test_a_transform_with_a_gradient_has_no_naive_number_and_an_undefended_model_none() -> None:
    clf, x, y = network(n=6)
    smooth = evaluate(get("mean-smooth")(size=2)(clf), x, y, threat=Linf(EPS), suite="fgsm")
    assert smooth.non_adaptive is not None
    assert "naive" not in smooth.non_adaptive
    plain = evaluate(clf, x, y, threat=Linf(EPS), suite="fgsm")
    assert plain.non_adaptive is None
    assert plain.manifest["defenses"] == []
    assert "non_adaptive" not in plain.manifest["results"]


@dataclass(frozen=True, kw_only=True)
class Lying(Defense):
    """A defence that declares a gradient and has none."""

    name: ClassVar[str] = "lying"
    weight: float = 1e-3

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """x, without a slope."""
        return x.detach() + 0 * x


def test_a_sample_that_only_an_unaware_attack_breaks_is_broken_with_evidence_and_a_doubt() -> None:
    clf, x, y = network(n=N)
    defended = Lying()(clf)
    verdict = evaluate(defended, x, y, threat=Linf(EPS), suite="fgsm")
    fell = sum(name == KINDS["replay"] for name in verdict.broken_by)
    assert fell > 4
    assert any(f"{fell} samples fell only to attacks that do not know" in line for line in verdict.warnings)
    assert verdict.robust_accuracy <= verdict.non_adaptive["replay"]  # type: ignore[index]
    assert verdict.verify(defended, x, y)["examples"] == len(verdict.adversarial)
    held = verdict.adversarial_index
    assert bool((clf.logits(verdict.adversarial).argmax(1) != y[held]).all())


# -- the suite obeys the declaration ----------------------------------------------------------------------------


def planned(name: str, suite: str) -> list[Stage]:
    """A suite's stages for a model behind one defence."""
    return adapted(suite, stages(suite, "linf")[1], get(name)()(network(n=1)[0]))


def test_gradients_of_a_randomised_defence_are_averaged_in_every_suite() -> None:
    for suite in ("quick", "standard", "rand", "full"):
        found = planned("gaussian-noise", suite)
        able = [stage for stage in found if stage.attack.startswith(("apgd", "pgd", "eot"))]
        assert able
        assert all(stage.params["copies"] == EOT for stage in able)
    assert planned("gaussian-noise", "pgd") == [Stage("pgd", {"copies": EOT})]
    assert planned("gaussian-noise", "eot-pgd") == [Stage("eot-pgd")], "its own default averages"
    assert planned("gaussian-noise", "score") == stages("score", "linf")[1]


def test_full_adds_the_attack_on_what_is_declared_and_nothing_else_changes() -> None:
    plain = stages("full", "linf")[1]
    assert planned("jpeg", "full")[: len(plain)] == plain
    assert planned("jpeg", "full")[len(plain) :] == [Stage("pgd", {"steps": 100, "restarts": 2})]
    assert planned("tv-min", "full")[-1] == Stage("eot-pgd", {"steps": 100, "copies": EOT})
    assert planned("median-smooth", "full") == plain
    assert planned("jpeg", "standard") == stages("standard", "linf")[1]


def test_a_declared_randomness_that_is_averaged_is_no_doubt() -> None:
    clf, x, y = network(n=4)
    defended = get("gaussian-noise")(sigma=0.05)(clf)
    verdict = evaluate(defended, x, y, threat=Linf(EPS), suite="pgd", seed=3)
    assert not [line for line in verdict.warnings if "randomised" in line]
    assert verdict.manifest["draws"] > 1
    verdict.verify(defended, x, y)
    common: dict[str, Any] = {
        "n": 200,
        "correct": 200,
        "robust": 0,
        "classes": 10,
        "undefined": 0,
        "marginal": 0,
    }
    common |= {"width": 1.0, "norm": "linf", "eps": EPS, "randomised": True, "suite": "quick", "stages": []}
    assert any("does not average" in line for line in raise_doubts(**common))
    assert raise_doubts(**common, averaged=True) == []


def test_a_randomised_outcome_does_not_depend_on_the_chunks() -> None:
    clf, x, y = network(n=6)
    defended = get("gaussian-noise")(sigma=0.05)(clf)
    whole, parts = (evaluate(defended, x, y, threat=Linf(EPS), suite="fgsm", chunk=chunk) for chunk in (6, 4))
    assert torch.equal(whole.correct, parts.correct)
    assert torch.equal(whole.clean_predictions, parts.clean_predictions)


# -- stored, resumed, verified ----------------------------------------------------------------------------------


def test_a_stored_verdict_is_verified_with_the_defended_model_only(shattered: Path) -> None:
    verdict, (defended, x, y) = Verdict.load(shattered), rounded()
    told = verdict.verify(defended, x, y)
    assert told["samples"] == N
    for other in (defended.undefended, get("bit-depth")(bits=4)(defended.undefended)):
        with pytest.raises(VerificationError, match="model is not the one"):
            verdict.verify(other, x, y)


def test_forged_claims_about_the_defence_are_found(shattered: Path, tmp_path: Path) -> None:
    import shutil

    def forged(name: str) -> Forger:
        shutil.copytree(shattered, tmp_path / name)
        return Forger(tmp_path / name)

    def refused(forger: Forger, match: str) -> None:
        forger.write()
        with pytest.raises(VerificationError, match=match):
            Verdict.load(forger.folder).verify(*rounded())

    number = forged("number")
    number.manifest["results"]["non_adaptive"]["naive"] = 0.1
    refused(number, "non_adaptive")
    flag = forged("flag")
    flag.manifest["defenses"][0]["bpda"] = False
    refused(flag, "non-adaptive attacks|declare")
    record = forged("record")
    place = next(k for k, line in enumerate(record.lines) if "non_adaptive" in line)
    record.lines[place]["non_adaptive"] = (
        "naive" if record.lines[place]["non_adaptive"] == "replay" else "replay"
    )
    refused(record, "group of another attack")
    fewer = forged("fewer")
    del fewer.lines[place]
    refused(fewer, "does not hold what its last line says")


class Stop(Exception):
    """Raised out of a progress callback."""


def test_stopped_anywhere_it_resumes_to_the_same_verdict(tmp_path: Path) -> None:
    def go(out: Path, calls: int, resume: bool = False) -> None:
        left = [calls]

        def progress(fraction: float, text: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Stop

        evaluate(*rounded(8), threat=Linf(EPS), suite="fgsm", chunk=4, out=out, resume=resume, progress=progress,
                 report=False)  # fmt: skip

    go(tmp_path / "whole", 1000)
    for calls in range(1, 40):
        out = tmp_path / str(calls)
        try:
            go(out, calls)
        except Stop:
            go(out, 1000, resume=True)
        else:
            assert calls > 6, "every group was interrupted"
            break
        assert facts(out) == facts(tmp_path / "whole"), calls
    other = rounded(8, bits=4)
    with pytest.raises(RunError, match="another model"):
        evaluate(*other, threat=Linf(EPS), suite="fgsm", chunk=4, out=tmp_path / "whole", resume=True)


DEFENSES = ("--defense", "bit-depth:bits=3", "--defense", "gaussian-noise:sigma=0.1")
COMMAND = ("eval", *DEFENSES, "--suite", "fgsm")


def test_killed_it_goes_on_and_a_report_verifies_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (*COMMAND, "--n", "6", "--json", "--out")
    out, whole = tmp_path / "run", tmp_path / "whole"
    process = Command(tmp_path / "said", *arguments, str(out))
    journal = out / "samples.jsonl"
    while not (journal.exists() and journal.read_text().count('"commit"') >= 2):
        assert process.process.is_alive(), (tmp_path / "said").read_text()
        time.sleep(0.002)
    process.kill()
    assert not (out / "manifest.json").exists(), "it was over before its time"
    assert run([*arguments, str(out), "--resume"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert run([*arguments, str(whole)]) == 0
    assert [item["name"] for item in found["defenses"]] == ["bit-depth", "gaussian-noise"]
    assert facts(out)["lines"] == facts(whole)["lines"]
    capsys.readouterr()
    said = ["report", str(out), "zoo:digits", "--data=digits", *DEFENSES, "--verify"]
    assert run(said) == 0
    assert "verified: 6 samples" in capsys.readouterr().out
    assert run([*said[:4], *DEFENSES[:2], "--verify"]) == 1, "another chain of defences"


# -- told -------------------------------------------------------------------------------------------------------


def test_the_table_and_the_report_tell_both_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = [
        "eval",
        "--defense",
        "bit-depth:bits=2",
        "--defense",
        "mean-smooth:size=2",
        "--suite",
        "fgsm",
    ]
    assert run([*arguments, "--n", "8", "--out", str(out)]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "behind bit-depth(bits=2), attacked by BPDA" in text
    assert "behind mean-smooth(size=2), attacked by its own gradient" in text
    assert "not adaptive replay" in text
    assert "overstated by" in text
    page = (out / "report.html").read_text()
    assert 'id="defense-table"' in page
    assert "bit-depth(bits=2), attacked by BPDA" in page
    beside = Verdict.load(out).non_adaptive
    assert beside is not None
    assert f"{100 * beside['naive']:.1f}\u00a0%" in page


@pytest.mark.parametrize(
    ("defense", "line"),
    [
        ("median-smoot", "did you mean median-smooth"),
        ("bit-depth:bits=9", "bit-depth: bits=9 is outside 1 to 8"),
        ("bit-depth:bit=4", "unknown key 'bit'"),
        ("bit-depth:bits", "is not KEY=VALUE"),
        ("jpeg:quality=high", "must be an integer"),
    ],
)
def test_a_bad_defense_is_one_line_and_writes_nothing(
    defense: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["eval"], ["attack", "pgd"]):
        assert run([*command, "--defense", defense, "--out", str(tmp_path / "run")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert error.startswith("error: --defense")
        assert line in error
    assert list(tmp_path.iterdir()) == []
    assert run(["eval", "--defense", "jpeg", "--answers", "scores"]) == 2


def test_one_attack_on_a_defended_model_averages_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["attack", "pgd", "--defense", "gaussian-noise", "--n", "3", "--set", "steps=2", "--json"]
    assert run(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["copies"] == EOT
    assert found["defenses"][0]["name"] == "gaussian-noise"
    assert run([*arguments, "--set", "copies=1"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"]["copies"] == 1


def test_every_defence_is_listed_with_how_it_is_attacked(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["list", "defenses", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (rows["tv-min"]["attacked by"], rows["median-smooth"]["attacked by"]) == ("BPDA + EOT", "autograd")
    assert all(row["paper"] for row in rows.values())
    transforms = {name for name in rows if rows[name]["kind"] == "transform"}
    assert {"tv-min", "median-smooth", "jpeg"} <= transforms
    assert rows["smoothing"]["kind"] == "certificate"


@pytest.mark.parametrize(("attack", "until"), [("pgd", "broken"), ("pgd", "strongest"), ("ddn", "smallest")])
def test_one_unlucky_draw_of_the_clean_point_breaks_nothing_and_is_attacked_all_the_same(
    attack: str, until: str
) -> None:
    clf, x, _ = network(n=60)
    defended = get("gaussian-noise")(sigma=0.2)(clf)
    y = decide(defended, x, torch.zeros(60, dtype=torch.long)).prediction
    rates = torch.stack([defended.logits(x).argmax(1) != y for _ in range(30)]).float().mean(0)
    assert int(((rates > 0.2) & (rates < 0.4)).sum()) > 3, "samples that a single draw often gets wrong"
    none = get_attack(attack)(threat=Linf(1e-6) if attack == "pgd" else L2(1e-6), until=until, steps=2)
    assert not bool(none.run(defended, x, y).success.any())
    much = get_attack("pgd")(threat=Linf(0.5), until="broken", steps=10, copies=10).run(defended, x, y)
    assert bool(much.success.all())
    assert bool(decide(defended, much.x_adv, y).hit.all())
