"""The package mapping: a bare checkout, an editable install and a wheel hold the same package, from any directory."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.house.sources import LAYERS, ROOMS, ROOT, sources

# Where every module would come from; most of them are found but not run, which spares the import of torch.
PROBE = """
import importlib, importlib.util, json, sys
if {isolated}:  # an editable install of this very checkout must not lend what is missing here
    sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
names = {names}
if {run}:
    list(map(importlib.import_module, names))
    names = [name for name in sys.modules if name.split(".")[0] == "robust"]
    assert not set(sys.modules) & {rooms}, "a room was loaded a second time, by its folder"
print(json.dumps({{name: importlib.util.find_spec(name).origin for name in names}}))
"""
NAMES = ["robust", "robust.registry", *(f"robust.{room}" for room in ROOMS), "robust.federated.aggregation"]


def probe(
    cwd: Path, path: Path | None, *, isolated: bool, run: bool = False, flags: tuple[str, ...] = ()
) -> dict[str, Path]:
    """Where each of `NAMES` comes from in a fresh interpreter in `cwd`, with `path` as its PYTHONPATH."""
    code = PROBE.format(isolated=isolated, run=run, names=NAMES, rooms=set(ROOMS))
    done = python(cwd, path, *flags, "-c", code)
    assert done.returncode == 0, done.stderr
    return {name: Path(file) for name, file in json.loads(done.stdout).items()}


def python(cwd: Path, path: Path | None, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter's answer."""
    environment = {
        key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "PYTHONSAFEPATH"}
    }
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def checkout(name: str) -> Path:
    """Where a module of `NAMES` lies in the checkout."""
    return next(ROOT / source.path for source in sources() if source.module == name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is left in the checkout or taken from an old build."""
    copy = tmp_path_factory.mktemp("copy")
    junk = shutil.ignore_patterns("__pycache__", "*.pyc")
    for folder in LAYERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=junk)
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    out = tmp_path_factory.mktemp("wheel")
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--quiet")
    done = python(out, None, "-m", "pip", "wheel", *options, "--wheel-dir", str(out), str(copy))
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel is unpacked."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_a_wheel_holds_every_module_once_and_all_data(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = sorted(name for name in archive.namelist() if ".dist-info/" not in name)
    expected = {source.path if source.layer == "robust" else f"robust/{source.path}" for source in sources()}
    data = ["robust/py.typed"]
    data += [str(path.relative_to(ROOT)) for path in (ROOT / "robust/zoo/weights").glob("*.safetensors")]
    data += [str(path.relative_to(ROOT)) for path in (ROOT / "robust/templates").rglob("*") if path.is_file()]
    data += [f"robust/{path.relative_to(ROOT)}" for path in (ROOT / "cuda_ops/csrc").glob("*.cu*")]
    for kind in ("toml", "json", "md"):
        data += [f"robust/{path.relative_to(ROOT)}" for path in (ROOT / "experiments").rglob(f"*.{kind}")]
    assert held == sorted(expected | set(data))


def test_a_wheel_works_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    found = probe(tmp_path, installed, isolated=True, run=True)
    assert set(NAMES) <= set(found)
    assert {file.is_relative_to(installed) for file in found.values()} == {True}


def test_a_wheel_works_in_the_checkout(installed: Path) -> None:
    found = probe(ROOT, installed, isolated=True, flags=("-P",))
    assert {file.is_relative_to(installed) for file in found.values()} == {True}


def test_with_a_wheel_the_checkout_wins_whole_where_python_looks_there_first(installed: Path) -> None:
    # `python -m pytest` puts the working directory first: then all of the package is the checkout's, none the wheel's.
    assert probe(ROOT, installed, isolated=True) == {name: checkout(name) for name in NAMES}


@pytest.mark.parametrize("inside", [False, True])
def test_a_bare_checkout_works(inside: bool, tmp_path: Path) -> None:
    found = probe(ROOT if inside else tmp_path, None if inside else ROOT, isolated=True)
    assert found == {name: checkout(name) for name in NAMES}


@pytest.mark.parametrize("inside", [False, True])
def test_an_editable_install_works(inside: bool, tmp_path: Path) -> None:
    # All of them: the checkout may hold an egg-info, which is another record of the same distribution.
    records = importlib.metadata.distributions(name="robust-toolkit")
    origins = [json.loads(record.read_text("direct_url.json") or "{}") for record in records]
    if not any(o.get("url") == ROOT.as_uri() and o["dir_info"].get("editable") for o in origins):
        pytest.skip("this environment has no editable install of this checkout: scripts/install makes one")
    found = probe(ROOT if inside else tmp_path, None, isolated=False)
    assert found == {name: checkout(name) for name in NAMES}


def test_the_main_job_runs_from_a_wheel_with_the_data_it_ships(installed: Path, tmp_path: Path) -> None:
    options = ("--n", "8", "--suite", "quick", "--out", "run", "--json")
    done = python(tmp_path, installed, "-m", "robust", "eval", *options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["n"] == 8
    assert (tmp_path / "run" / "report.html").stat().st_size > 0


def test_a_wheel_has_the_console_script_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entry = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "robust = robust.cli.main:main" in archive.read(entry).decode()
        assert not [name for name in archive.namelist() if name.startswith(("tests/", "setup"))]
