"""Configurations: what is read is typed, and what is wrong is named with its line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from robust.config import from_mapping, load_config, number
from robust.errors import ConfigError


@dataclass(frozen=True)
class Step:
    at: int
    rate: float = 0.1


@dataclass(frozen=True)
class Attack:
    """An attack's options, of which one checks itself."""

    eps: float
    steps: int = 20
    norm: Literal["linf", "l2"] = "linf"

    def __post_init__(self) -> None:
        if self.eps < 0:
            raise ValueError(f"eps={self.eps} is negative")


@dataclass(frozen=True)
class Run:
    """A run, with every kind of field."""

    name: str
    attack: Attack
    seed: int = 0
    fast: bool = False
    out: Path | None = None
    shape: tuple[int, int] = (1, 1)
    mean: tuple[float, ...] = ()
    schedule: tuple[Step, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)
    limit: int | str = "none"
    fallback: Attack | None = None


@dataclass(frozen=True)
class Client:
    attack: Attack


@dataclass(frozen=True)
class Clients:
    clients: tuple[Client, ...]


GOOD = """\
# a comment
name = "a"
seed = 3
out = "runs/a"
shape = [28, 14]
mean = [
    0.5,  # a comment inside
    "1/2",
    1,
]
limit = 7

[attack]
eps = "8/255"
norm = "l2"

[labels]
cat = 1
"a dog" = 2

[[schedule]]
at = 1

[[schedule]]
at = 2
rate = 1e-2
"""


def write(folder: Path, text: str) -> Path:
    """A configuration file with `text`."""
    path = folder / "run.toml"
    path.write_text(text)
    return path


def error(folder: Path, text: str) -> str:
    """The one line that `text` is refused with, without the folder."""
    with pytest.raises(ConfigError) as caught:
        load_config(write(folder, text), Run)
    line = str(caught.value)
    assert "\n" not in line
    return line.removeprefix(f"{folder}/")


def test_a_whole_configuration_is_read(tmp_path: Path) -> None:
    run = load_config(write(tmp_path, GOOD), Run)
    assert run == Run(
        name="a",
        attack=Attack(eps=8 / 255, norm="l2"),
        seed=3,
        out=Path("runs/a"),
        shape=(28, 14),
        mean=(0.5, 0.5, 1.0),
        schedule=(Step(1), Step(2, 0.01)),
        labels={"cat": 1, "a dog": 2},
        limit=7,
    )
    assert all(type(value) is float for value in run.mean)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("seed = 3", "sed = 3", "run.toml:3: unknown key 'sed'; did you mean 'seed'?"),
        ("norm =", "nrm =", "run.toml:15: unknown key 'nrm' in [attack]; did you mean 'norm'?"),
        ("seed = 3", "zzzz = 3", "run.toml:3: unknown key 'zzzz'; known are name, attack, seed, fast, out, "),
        ("seed = 3", 'seed = "3"', "run.toml:3: seed is '3'; it must be an integer"),
        ("seed = 3", "seed = 3.0", "run.toml:3: seed is 3.0; it must be an integer"),
        ("seed = 3", "seed = true", "run.toml:3: seed is true; it must be an integer"),
        ("seed = 3", "fast = 1", "run.toml:3: fast is 1; it must be true or false"),
        ("seed = 3", "seed = [3]", "run.toml:3: seed is [...]; it must be an integer"),
        ('"l2"', '"l3"', "run.toml:15: attack.norm is 'l3'; it must be one of 'linf', 'l2'"),
        ('"8/255"', '"8/0"', "run.toml:14: attack.eps: '8/0' is not a number; write a decimal or a fraction"),
        ('"8/255"', "true", "run.toml:14: attack.eps is true; it must be a number"),
        ('"8/255"', "-1", "run.toml:13: eps=-1.0 is negative"),
        ('eps = "8/255"\n', "", "run.toml:13: missing key 'eps' in [attack]; it is a number"),
        ('name = "a"\n', "", "run.toml:1: missing key 'name'; it is a text"),
        ("[28, 14]", "[28]", "run.toml:5: shape has 1 items; it is an array of 2 items"),
        ('"1/2"', '"half"', "run.toml:6: mean[1]: 'half' is not a number"),
        ("at = 2", "at = 2.5", "run.toml:25: schedule[1].at is 2.5; it must be an integer"),
        ("at = 2", "rat = 2", "run.toml:25: unknown key 'rat' in [schedule[1]]; did you mean 'rate'?"),
        ("at = 2\n", "", "run.toml:24: missing key 'at' in [schedule[1]]; it is an integer"),
        ("cat = 1", 'cat = "one"', "run.toml:18: labels.cat is 'one'; it must be an integer"),
        ("limit = 7", "limit = 7.5", "run.toml:11: limit is 7.5; it must be an integer or a text"),
        (
            "limit = 7",
            "fallback = {eps = 1, stps = 2}",
            "run.toml:11: unknown key 'stps' in [fallback]; did you",
        ),
        ("limit = 7", "fallback = 7", "run.toml:11: fallback is 7; it must be a table"),
        ("seed = 3", "attack.steps = 3", "run.toml:13: not valid TOML: "),
        ("seed = 3", "seed =", "run.toml:3: not valid TOML: Invalid value"),
    ],
)
def test_a_mistake_is_named_with_its_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert error(tmp_path, GOOD.replace(old, new)).startswith(expected)


def test_a_long_text_does_not_hide_the_lines_below_it(tmp_path: Path) -> None:
    text = 'name = """\n[attack]\nseed = 1\n"""\nattack = {eps = 0.1}\nsed = 4\n'
    assert error(tmp_path, text) == "run.toml:6: unknown key 'sed'; did you mean 'seed'?"


def test_a_table_inside_an_array_of_tables_has_its_own_line(tmp_path: Path) -> None:
    text = "[[clients]]\n[clients.attack]\neps = 1\n[[clients]]\n[clients.attack]\neps = 1\nsteps = 'x'\n"
    with pytest.raises(ConfigError, match=r"run.toml:7: clients\[1\].attack.steps is 'x'"):
        load_config(write(tmp_path, text), Clients)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.toml: cannot read this configuration: No such file"):
        load_config(tmp_path / "absent.toml", Run)
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path, Run)
    path = tmp_path / "latin.toml"
    path.write_bytes(b"name = '\xe9'")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_config(path, Run)


def test_a_mapping_is_checked_like_a_file() -> None:
    run = from_mapping({"name": "a", "attack": {"eps": 1}, "shape": (2, 3), "fallback": None}, Run)
    assert (run.attack, run.shape) == (Attack(1.0), (2, 3))
    with pytest.raises(ConfigError, match=r"^fl: unknown key 'nam'; did you mean 'name'"):
        from_mapping({"nam": "a"}, Run, "fl")


def test_numbers_accept_fractions() -> None:
    assert number("8/255") == 8 / 255
    assert number("0.03") == 0.03
    assert number("inf") == math.inf
    assert number("0.5/255") == 0.5 / 255
    for text in ("", "8/", "8/0", "eight", "8//255", "1/2/3"):
        with pytest.raises(ConfigError, match="is not a number"):
            number(text)
