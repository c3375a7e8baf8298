"""The documents and the scripts: what they tell people to run is what CI runs, and exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.core import TyperCommand, TyperGroup

from robust.cli.main import COMMANDS, build
from tests.house.sources import ROOMS, ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def command_lines() -> list[list[str]]:
    """Every `robust ...` that the README tells people to run, in words."""
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    inline = re.findall(r"`(robust [a-z][^`]*)`", README)
    lines = [line.split("&&")[-1].strip() for line in text.splitlines()] + inline
    return [shlex.split(line) for line in lines if re.match(r"(\.venv/bin/)?robust ", line)]


def options(name: str, then: str = "") -> set[str]:
    """The options of a command, or of the one named `then` inside a group of commands."""
    command = build(name)
    if isinstance(command, TyperGroup):
        command = command.get_command(None, then)
    assert isinstance(command, TyperCommand)
    return {option for parameter in command.params for option in parameter.opts}


def test_ci_runs_exactly_the_readmes_two_commands() -> None:
    main, test = (block.strip() for block in blocks("bash")[:2])
    lines = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert main.endswith("robust eval")
    assert test.endswith("-m pytest")
    assert lines.count(main) == lines.count(test) == 1
    assert lines.index("main_job() {") == lines.index(main) - 1
    assert lines.index("tests() {") == lines.index(test) - 1
    assert lines[-1] == "tests"


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_a_command_of_the_readme_exists(words: list[str]) -> None:
    assert words[1] in COMMANDS
    named = {word for word in words if word.startswith("--")}
    known = options(words[1], words[2] if len(words) > 2 else "")
    assert named <= known, f"robust {words[1]} has no {named - known}"


def test_the_readmes_python_runs(tmp_path: Path) -> None:
    for code in blocks("python"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "clean " in done.stdout


def test_the_readme_is_one_page() -> None:
    assert len(README.splitlines()) < 200


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_what_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    paths = re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py)?)`", text)
    scripts = re.findall(
        r"^(?:bash )?((?:scripts|\.ci)/[a-z]+)", "\n".join(blocks("bash", text)), re.MULTILINE
    )
    named = {*links, *paths, *scripts}
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_executable_bash(script: Path) -> None:
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_the_typecheck_sees_every_room() -> None:
    text = (ROOT / "scripts" / "typecheck").read_text()
    assert f"for room in {' '.join(sorted(ROOMS))}; do" in text
