"""`verify` passes what was found, and refuses whatever was changed since, by accident or on purpose."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robust import Classifier, Linf, Verdict, evaluate
from robust.errors import RunError, VerificationError
from tests.robust.forger import EXAMPLES, FORGERIES, JOURNAL, MANIFEST, Forger
from tests.robust.subjects import Subject, between, linear

FRESH = """
import sys, torch
from robust import Verdict
from tests.robust.forger import EXAMPLES, FORGERIES, JOURNAL, MANIFEST, Forger
from tests.robust.subjects import linear
clf, x, y, _ = linear()
print(Verdict.load(sys.argv[1]).verify(clf, x, y))
"""


@pytest.fixture(scope="module")
def subject() -> Subject:
    return linear()


@pytest.fixture(scope="module")
def original(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: two samples wrong from the start, some that fall at each of two radii, some that stand."""
    clf, x, y, radius = subject
    folder = tmp_path_factory.mktemp("verify") / "run"
    threats = [Linf(between(radius, share)) for share in (0.3, 0.6)]
    verdict = evaluate(clf, x, y, threat=threats, suite=["fgsm", "pgd"], chunk=6, out=folder)
    assert len({*verdict.eps_broken.tolist()}) == 3
    assert 0 < verdict.robust_accuracy < verdict.clean_accuracy < 1
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(original, tmp_path / "run"))


def refused(folder: Path, subject: Subject, match: str) -> None:
    """Loading or verifying fails with one line that says `match`."""
    with pytest.raises(VerificationError, match=match) as caught:
        Verdict.load(folder).verify(*subject[:3])
    assert "\n" not in str(caught.value)


# -- as it was ------------------------------------------------------------------------------------------------


def test_an_untouched_folder_passes_here_and_in_a_fresh_process(
    original: Path, subject: Subject, root: Path
) -> None:
    verdict = Verdict.load(original)
    found = verdict.verify(*subject[:3])
    assert found == {"samples": 16, "examples": len(verdict.adversarial_index), "marginal_differences": []}
    command = [sys.executable, "-c", FRESH, str(original)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(found), done.stderr


def test_a_verdict_in_memory_is_checked_too(subject: Subject) -> None:
    clf, x, y, radius = subject
    verdict = evaluate(clf, x, y, threat=Linf(between(radius, 0.6)), suite=["pgd"])
    assert verdict.verify(clf, x, y)["examples"] > 0
    assert verdict.verify(clf, list(zip(x, y, strict=True)))["samples"] == 16
    verdict.adversarial[0] = x[int(verdict.adversarial_index[0])]
    with pytest.raises(VerificationError, match="not at the distance"):
        verdict.verify(clf, x, y)


class Tilted(nn.Module):
    """A linear model that computes a little differently on other hardware, which its digest does not show."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.tilt = nn.Parameter(weight), 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits, the first one tilted."""
        return x.flatten(1) @ self.weight.T + torch.tensor([self.tilt, 0.0])


def test_marginal_rows_are_reported_and_no_failure(tmp_path: Path) -> None:
    module = Tilted(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]]))
    x = torch.full((3, 1, 2, 2), 0.5)
    x[1, 0, 0, 0] += 0.1  # falls at 0.05, just
    x[2, 0, 0, 0] += 0.3
    x[0, 0, 0, 0] += 1e-6  # right, just
    y = torch.zeros(3, dtype=torch.long)
    verdict = evaluate(
        Classifier(module), x, y, threat=Linf(0.05 + 2e-6), suite=["pgd"], out=tmp_path / "run"
    )
    assert verdict.marginal.tolist() == [False, True, False], "the first one was broken, clearly"
    assert verdict.broken_by == ["pgd", "pgd", None]
    assert any("1 outcomes are within float noise" in line for line in verdict.warnings)
    for tilt, differing in ((0.0, []), (-2e-6, [0]), (5e-6, [1])):
        module.tilt = tilt
        assert (
            Verdict.load(tmp_path / "run").verify(Classifier(module), x, y)["marginal_differences"]
            == differing
        )
    for tilt, match in (
        (-0.01, "clean sample 0 is predicted 1"),
        (0.02, "the example of sample [01] is predicted 0"),
    ):
        module.tilt = tilt
        with pytest.raises(VerificationError, match=match):
            Verdict.load(tmp_path / "run").verify(Classifier(module), x, y)


def test_verify_leaves_the_model_as_it_was(original: Path, subject: Subject) -> None:
    module = subject.clf.module
    clf = Classifier(module.train(), name="linear")
    clf.randomised = True
    try:
        Verdict.load(original).verify(clf, subject.x, subject.y)
        assert module.training
        assert clf.randomised
    finally:
        module.eval()


# -- changed by accident --------------------------------------------------------------------------------------


def test_one_altered_pixel_is_refused(folder: Path, subject: Subject) -> None:
    raw = bytearray((folder / EXAMPLES).read_bytes())
    raw[-5] ^= 1
    (folder / EXAMPLES).write_bytes(raw)
    refused(folder, subject, f"{EXAMPLES} was altered")


def test_any_altered_byte_of_the_manifest_is_refused(folder: Path, subject: Subject) -> None:
    raw = (folder / MANIFEST).read_bytes()
    chance = random.Random(3)
    places = {0, len(raw) - 1, *chance.sample(range(len(raw)), 150)}
    for place in places:
        changed = bytearray(raw)
        changed[place] = chance.choice([byte for byte in range(256) if byte != raw[place]])
        (folder / MANIFEST).write_bytes(changed)
        refused(folder, subject, f"{MANIFEST} was altered")
    for longer in (raw + b" ", raw[:-1], b""):
        (folder / MANIFEST).write_bytes(longer)
        refused(folder, subject, f"{MANIFEST} was altered")


def test_any_altered_byte_of_the_samples_or_the_digests_is_refused(folder: Path, subject: Subject) -> None:
    chance = random.Random(4)
    for name, match in (
        (JOURNAL, f"{JOURNAL} was altered"),
        ("digests.json", "."),
        (EXAMPLES, f"{EXAMPLES} was"),
    ):
        raw = (folder / name).read_bytes()
        for place in chance.sample(range(len(raw)), 40):
            changed = bytearray(raw)
            changed[place] ^= 1 << chance.randrange(8)
            if name == "digests.json" and raw[place : place + 1].isspace():
                continue  # between JSON's words
            (folder / name).write_bytes(changed)
            refused(folder, subject, match)
        (folder / name).write_bytes(raw)
    Verdict.load(folder).verify(*subject[:3])


def test_one_altered_label_is_refused(folder: Path, subject: Subject) -> None:
    text = (folder / JOURNAL).read_text()
    label = json.loads(text.splitlines()[0])["y"]
    (folder / JOURNAL).write_text(text.replace(f'"y": {label}', f'"y": {(label + 1) % 3}', 1))
    refused(folder, subject, f"{JOURNAL} was altered")


@pytest.mark.parametrize("name", [MANIFEST, JOURNAL, EXAMPLES, "report.html", "digests.json"])
def test_a_deleted_file_is_refused(name: str, folder: Path, subject: Subject) -> None:
    (folder / name).unlink()
    if name == "digests.json":
        refused(folder, subject, "digests.json is missing")
    else:
        refused(folder, subject, f"{name} is missing")


def test_what_is_no_finished_run_is_one_line(tmp_path: Path, folder: Path) -> None:
    (folder / "digests.json").unlink()
    (folder / "plan.json").write_text("{}")
    for place, match in (
        (tmp_path / "nowhere", "no run folder"),
        (tmp_path, "--resume"),
        (folder, "--resume"),
    ):
        with pytest.raises(RunError, match=match) as caught:
            Verdict.load(place)
        assert "\n" not in str(caught.value)


# -- the wrong model or data ----------------------------------------------------------------------------------


def test_another_model_is_refused(original: Path, subject: Subject) -> None:
    clf, x, y, _ = subject
    verdict = Verdict.load(original)
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    module.load_state_dict(clf.module.state_dict())
    with torch.no_grad():
        module[1].weight[0, 0] += 1e-6
    for other in (
        Classifier(module.eval()),
        Classifier(clf.module, mean=0.001),
        Classifier(clf.module, bounds=(0, 2)),
    ):
        with pytest.raises(VerificationError, match="the model is not the one"):
            verdict.verify(other, x, y)


def test_other_data_is_refused(original: Path, subject: Subject) -> None:
    clf, x, y, _ = subject
    verdict = Verdict.load(original)
    moved, relabelled = x.clone(), y.clone()
    moved[7, 0, 0, 0] += 1e-6
    relabelled[9] = (relabelled[9] + 1) % 3
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((moved, y), "sample 7 of the data given is not the one"),
        ((x, relabelled), "sample 9 has the label"),
        ((x.flip(0), y.flip(0)), "sample 0"),
        ((x[:15], y[:15]), "about 16 samples, the data given has 15"),
        ((x.transpose(2, 3).contiguous(), y), "sample 0 of the data given"),
        ((x, None), "labels are missing"),
    ]
    for data, match in cases:
        with pytest.raises(VerificationError, match=match):
            verdict.verify(clf, *data)


# -- changed on purpose, with the digests made anew ------------------------------------------------------------


@pytest.mark.parametrize("case", FORGERIES)
def test_a_forgery_with_fitting_digests_is_refused(case: str, folder: Path, subject: Subject) -> None:
    forger, (change, match) = Forger(folder), FORGERIES[case]
    forger.write()
    Verdict.load(folder).verify(*subject[:3])  # the forger's files are as good as the original's
    change(forger, subject.x) if change.__code__.co_argcount == 2 else change(forger)
    forger.write()
    with pytest.raises((VerificationError, RunError), match=match) as caught:
        Verdict.load(folder).verify(*subject[:3])
    assert "\n" not in str(caught.value)
