"""The command line: one line for bad input, one object for --json, and nothing heavy before it is needed."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from robust.classifier import Classifier
from robust.cli import options
from robust.cli.main import COMMANDS, HELP, run
from robust.cli.progress import Clock, Meter, duration
from robust.errors import ConfigError
from robust.registry import card, room

MODEL = """
import torch
from torch import nn

def linear():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[4.0, 0, 0, 0], [0, 4.0, 0, 0], [0, 0, 4.0, 0]]))
        model[1].bias.zero_()
    return model
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a linear model of three classes and twelve points, each right by a logit margin of 0.8."""
    (tmp_path / "model.py").write_text(MODEL)
    y = np.arange(12) % 3
    x = np.full((12, 1, 2, 2), 0.4, np.float32)
    x.reshape(12, 4)[np.arange(12), y] = 0.6
    np.savez(tmp_path / "data.npz", x=x, y=y, layout="NCHW")
    monkeypatch.chdir(tmp_path)
    return tmp_path


SUBJECT = ["model.py:linear", "--data", "npz:data.npz"]


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Standard output of a command that ends with `code`."""
    found = run(arguments)
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.out


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 2) -> str:
    """The one line on standard error of a command that fails."""
    found = run(arguments)
    captured = capsys.readouterr()
    assert found == code
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert "Traceback" not in captured.err
    return captured.err.removeprefix("error: ").rstrip()


def imported(*arguments: str) -> set[str]:
    """Top-level packages that a command has imported when it ends."""
    code = f"import sys; from robust.cli.main import run; run({list(arguments)}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["list"], ["list", "suites"], ["eval", "--help"]]
)
def test_help_and_overviews_need_no_torch(arguments: list[str]) -> None:
    assert not imported(*arguments) & {
        "torch",
        "torchvision",
        "sklearn",
        "matplotlib",
        "scipy",
        "numpy",
        "jinja2",
    }


def test_listing_attacks_needs_neither_torchvision_nor_sklearn_nor_matplotlib() -> None:
    assert not imported("list", "attacks") & {"torchvision", "sklearn", "matplotlib", "jinja2"}


def test_every_command_has_a_card_and_a_line_of_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(HELP) == set(COMMANDS)
    text = answer(capsys, "--help")
    for name in COMMANDS:
        assert card(COMMANDS.load(name))
        assert HELP[name] in text
        assert "--help" in answer(capsys, name, "--help")


@pytest.mark.parametrize("kind", ["attacks", "suites", "losses", "models", "data", "recipes", "aggregators"])
def test_list_prints_every_name_of_a_kind(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(answer(capsys, "list", kind, "--json"))
    assert found["kind"] == kind
    names = [row["name"] for row in found["rows"]]
    assert len(set(names)) == len(names)
    assert all(row["card"] for row in found["rows"])
    text = answer(capsys, "list", kind)
    assert all(name in text for name in names)
    assert names or "in this version yet" in text


def test_list_tells_what_an_attack_knows_and_which_norms_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["name"]: row for row in json.loads(answer(capsys, "list", "attacks", "--json"))["rows"]}
    assert set(rows) == set(room("attacks"))
    assert rows["pgd"]["knowledge"] == "white"
    assert rows["square"]["knowledge"] == "score"
    assert rows["fgsm"]["norms"] == ["linf"]


def test_list_without_a_kind_names_the_kinds(capsys: pytest.CaptureFixture[str]) -> None:
    names = [row["name"] for row in json.loads(answer(capsys, "list", "--json"))["rows"]]
    assert {"attacks", "models", "data", "recipes", "aggregators"} <= set(names)


@pytest.mark.parametrize("command", [["eval"], ["attack", "pgd"]])
@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--eps", "8"], "eps=8 is outside the box [0, 1]; did you mean 8/255?"),
        (["--eps", "-1"], "eps=-1 leaves nothing to attack"),
        (["--eps", "0"], "positive radius such as 8/255"),
        (["--eps", "nan"], "nan is not a number"),
        (["--eps", "a/b"], "'a/b' is not a number"),
        (["--eps", "1/0"], "fraction such as 8/255"),
        (["--eps", "300", "--bounds", "0,255"], "it is 255 wide"),
        (["--eps", "1/255,inf"], "stands alone"),
        (["--eps", "inf", "--norm", "l2"], "finite eps"),
        (["--eps", "2.5", "--norm", "l0"], "count of pixels"),
        (["--norm", "l3"], "unknown norm 'l3'; did you mean"),
        (["--n", "0"], "at least 1"),
        (["--n", "-5"], "at least 1"),
        (["--n", "ten"], "--n"),
        (["--seed", "-1"], "0 or more"),
        (["--bounds", "1,0"], "lowest and the highest"),
        (["--bounds", "0"], "lowest and the highest"),
        (["--mean", "a"], "--mean: 'a' is not a number"),
        (["--std", "0"], "above 0"),
        (["--weights", "absent.safetensors"], "absent.safetensors does not exist"),
        (["--weights", "pickle.pt"], "pickle.pt"),
        (["--data-root", "absent"], "absent does not exist"),
        (["--device", "cuda:99"], "not on this machine"),
        (["--device", "abacus"], "not on this machine"),
        (["--data", "npz:absent.npz"], "absent.npz does not exist"),
        (["--data", "npz:empty.npz"], "holds no images"),
        (["--data", "npz:wide.npz"], "fails on inputs of shape"),
        (["--data", "digitz"], "did you mean digits"),
        (["--speed", "9"], "No such option: --speed"),
    ],
)
def test_bad_input_gets_one_line_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str], command: list[str], arguments: list[str], part: str
) -> None:
    np.savez(place / "empty.npz", x=np.zeros((0, 1, 2, 2), np.float32), y=np.zeros(0, int), layout="NCHW")
    np.savez(place / "wide.npz", x=np.zeros((3, 1, 5, 5), np.float32), y=np.zeros(3, int), layout="NCHW")
    torch.save({"model": Classifier(torch.nn.Flatten())}, place / "pickle.pt")
    before = sorted(place.rglob("*.[!p]*"))
    assert part in complaint(capsys, *command, *SUBJECT, *arguments)
    assert sorted(place.rglob("*.[!p]*")) == before
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["evl"], "unknown command 'evl'; did you mean eval"),
        (["list", "atacks"], "did you mean attacks"),
        (["attack"], "Missing argument 'NAME'"),
        (["attack", "pdg"], "did you mean pgd"),
        (["eval", "absent.py:net", "--data", "digits"], "absent.py does not exist"),
        (["eval", "zoo:resnet20"], "--data is missing"),
        (["eval", "zoo:digitz", "--data", "digits"], "did you mean"),
        (["eval", *SUBJECT, "--suite", "standrad"], "did you mean standard"),
        (["eval", *SUBJECT, "--suite", "pgd,foo"], "unknown attack 'foo'"),
        (["attack", "pgd", *SUBJECT, "--precision", "int8"], "known are auto, bfloat16"),
        (["eval", *SUBJECT, "--precision", "float"], "did you mean float32"),
        (["eval", *SUBJECT, "--resume"], "no run"),
        (["eval", *SUBJECT, "--out", "model.py/run"], "is a file"),
        (["attack", "pgd", *SUBJECT, "--eps", "0.1,0.2"], "one radius"),
        (["attack", "fgsm", *SUBJECT, "--norm", "l2"], "fgsm has no l2 form; it knows linf"),
        (["attack", "pgd", *SUBJECT, "--set", "stepz=3"], "unknown key 'stepz'; did you mean 'steps'"),
        (["attack", "pgd", *SUBJECT, "--set", "zzz=3"], "known are until, loss, steps"),
        (["attack", "pgd", *SUBJECT, "--set", "steps=many"], "steps is 'many'; it must be an integer"),
        (["attack", "pgd", *SUBJECT, "--set", "steps"], "KEY=VALUE"),
        (["attack", "pgd", *SUBJECT, "--set", "steps=1", "--set", "steps=2"], "given twice"),
        (["attack", "pgd", *SUBJECT, "--set", "steps=0"], "steps=0"),
        (["attack", "pgd", *SUBJECT, "--target", "7"], "classes 0 to 2"),
        (["report", "absent"], "absent"),
    ],
)
def test_wrong_names_and_settings_get_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], part: str
) -> None:
    assert part in complaint(capsys, *arguments)
    assert not (place / "runs").exists()


def test_numbers_may_be_fractions() -> None:
    assert options.numbers("8/255, 0.5,1e-3", "--eps") == (8 / 255, 0.5, 1e-3)
    with pytest.raises(ConfigError):
        options.number("", "--eps")


def test_the_usual_radius_depends_on_norm_and_data() -> None:
    assert options.usual_eps("linf", "cifar10") == "8/255"
    assert options.usual_eps("linf", "mnist") == "0.3"
    assert options.usual_eps("linf", "imagefolder:some/where") == "4/255"
    assert options.usual_eps("l2", "npz:a.npz") == "0.5"


@pytest.mark.parametrize(("eps", "rate"), [("0.09", 0.0), ("0.11", 1.0)])
def test_attack_breaks_a_linear_model_from_its_exact_margin_on(
    place: Path, capsys: pytest.CaptureFixture[str], eps: str, rate: float
) -> None:
    # The logit margin is 0.8 and moves by 8 per unit of linf: the model falls at 0.1.
    found = json.loads(answer(capsys, "attack", "pgd", *SUBJECT, "--eps", eps, "--json"))
    assert found["success_rate"] == rate
    assert (found["clean_accuracy"], found["robust_accuracy"]) == (1.0, 1 - rate)
    assert (found["n"], found["attempted"], found["out"]) == (12, 12, None)
    assert found["threat"] == {"norm": "linf", "eps": float(eps)}
    assert set(found) >= {
        "clean_accuracy",
        "robust_accuracy",
        "n",
        "threat",
        "suite",
        "seconds",
        "warnings",
        "out",
    }
    if rate:
        assert found["median_linf"] == pytest.approx(float(eps), abs=1e-6)
        assert found["median_l2"] >= found["median_linf"]


def test_attack_takes_settings_and_saves_what_it_found(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--eps",
        "0.2",
        "--set",
        "steps=3",
        "--set",
        "restarts=2",
        "--set",
        "loss=margin",
        "--n",
        "5",
    ]
    text = answer(capsys, "attack", "pgd", *SUBJECT, *arguments, "--out", "new/found.safetensors")
    assert "100.0 %   5 of 5 samples" in text
    assert "steps=3" in text
    saved = load_file(place / "new" / "found.safetensors")
    assert saved["x"].shape == saved["x_adv"].shape == (5, 1, 2, 2)
    assert ((saved["x_adv"] - saved["x"]).abs() <= 0.2 + 1e-6).all()
    weight = torch.zeros(3, 4)
    weight[:, :3] = 4 * torch.eye(3)
    wrong = (saved["x_adv"].flatten(1) @ weight.T).argmax(1) != saved["y"]
    assert torch.equal(wrong, saved["success"])


def test_a_targeted_attack_counts_the_samples_that_reach_the_class(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(answer(capsys, "attack", "pgd", *SUBJECT, "--eps", "0.2", "--target", "1", "--json"))
    assert found["attempted"] == 8  # the other four are of class 1 already
    assert found["success_rate"] == 1.0
    assert found["robust_accuracy"] == pytest.approx(4 / 12)


def test_another_box_scales_the_data_and_the_radius(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In [-1, 1] every margin is twice as wide; mean and std bring the model back to its own unit.
    arguments = ["--bounds=-1,1", "--mean=-1", "--std", "2"]
    rates = [
        json.loads(answer(capsys, "attack", "pgd", *SUBJECT, *arguments, "--eps", eps, "--json"))[
            "success_rate"
        ]
        for eps in ("0.19", "0.21")
    ]
    assert rates == [0.0, 1.0]


@pytest.mark.parametrize(
    ("error", "code", "part"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "runs/a"), 2, "runs/a: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), 2, "/etc/x: not permitted"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_what_the_system_refuses_gets_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    part: str,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr("robust.cli.list.list_names", fail)
    assert part in complaint(capsys, "list", code=code)


def test_a_closed_pipe_is_no_error() -> None:
    code = "import sys; from robust.cli.main import main; sys.argv = ['robust', 'list']; main()"
    command = f'{sys.executable} -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_clock_ignores_what_a_resumed_run_had_already() -> None:
    clock = Clock()
    assert clock.left() == "unknown time"
    clock.tell(0.6, now=100.0)
    clock.tell(0.7, now=110.0)
    assert clock.seconds(now=110.0) == pytest.approx(30.0)
    assert clock.seconds(now=115.0) == pytest.approx(25.0)
    assert clock.seconds(now=1000.0) == 0.0


def test_durations_are_written_as_people_read_them() -> None:
    assert [duration(s) for s in (0.2, 59, 185, 7620)] == ["0 s", "59 s", "3 min 05 s", "2 h 07 min"]


def test_progress_never_touches_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robust.cli.progress.QUIET_SECONDS", 0.0)
    with Meter("working") as meter:
        meter(0.25, "apgd-ce")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == " 25%  apgd-ce, unknown time left\n"
    with Meter("working", quiet=True) as meter:
        meter(0.5)
    assert capsys.readouterr().err == ""
