"""A run's folder has one process at work in it at a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from robust import Classifier, Linf, Verdict, evaluate, fit
from robust.claim import claimed, claiming
from robust.errors import RunError
from robust.losses import cross_entropy
from tests.robust.subjects import linear

HOLD = """import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()"""


def somebody_in(folder: Path) -> subprocess.Popen[str]:
    """Another process, at work in `folder`."""
    folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def pieces() -> tuple[Classifier, Tensor, Tensor]:
    """A small model with samples."""
    subject = linear()
    return subject.clf, subject.x, subject.y


def verdict(folder: Path, **more: object) -> Verdict:
    """A small evaluation."""
    clf, x, y = pieces()
    return evaluate(clf, x, y, threat=Linf(0.1), suite=["fgsm"], out=folder, **more)  # type: ignore[arg-type]


def training(folder: Path) -> object:
    """A small training."""
    clf, x, y = pieces()
    return fit(
        clf, (x, y), loss=lambda clf, x, y, index, seed: cross_entropy(clf(x), y).mean(), epochs=1, out=folder
    )


@pytest.mark.parametrize("work", [verdict, training])
def test_a_second_run_in_a_folder_is_refused_until_the_first_one_is_dead(
    work: Callable[[Path], object], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = somebody_in(folder)
    with pytest.raises(RunError, match="run is in use by another run; wait for it to end, or choose another"):
        work(folder)
    assert list(folder.iterdir()) == []
    process.kill()
    process.communicate()
    work(folder)
    assert any(folder.iterdir())


def test_a_claim_ends_with_its_body_however_that_ends_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"

    def fails() -> None:
        with claimed(folder):
            assert folder.is_dir()
            with pytest.raises(RunError), claimed(folder):
                pass
            raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        fails()
    assert list(tmp_path.iterdir()) == []
    with claimed(folder):
        (folder / "kept").touch()
    with claimed(folder), claimed(tmp_path), claimed(None):
        assert [path.name for path in folder.iterdir()] == ["kept"], "no lock file"
    (tmp_path / "file").touch()
    with claimed(tmp_path / "file" / "below"):
        """What cannot be made is for the body to say."""


def test_a_function_is_alone_in_its_out_folder_however_it_is_given(tmp_path: Path) -> None:
    @claiming
    def run(name: str, out: Path | None = None) -> str:
        """Says its name."""
        if out is not None:
            with pytest.raises(RunError), claimed(out):
                pass
        return name

    assert [run("a"), run("b", tmp_path), run("c", out=tmp_path), run("d", None)] == ["a", "b", "c", "d"]
    assert (run.__name__, run.__doc__) == ("run", "Says its name.")
    with pytest.raises(TypeError, match="unexpected keyword"):
        run("e", into=tmp_path)  # type: ignore[call-arg]


def test_a_run_that_is_under_way_is_not_resumed_beside_itself(tmp_path: Path) -> None:
    clf, x, y = pieces()
    seen = []

    def again(fraction: float, text: str) -> None:
        with pytest.raises(RunError, match="in use"):
            evaluate(clf, x, y, threat=Linf(0.1), suite=["fgsm"], out=tmp_path / "run", resume=True)
        seen.append(fraction)

    found = evaluate(clf, x, y, threat=Linf(0.1), suite=["fgsm"], out=tmp_path / "run", progress=again)
    assert seen
    assert torch.equal(found.robust, verdict(tmp_path / "other").robust)
    found.verify(clf, x, y)
