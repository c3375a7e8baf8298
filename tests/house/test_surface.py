"""The public surface: its names, that they load late, and what `import robust` may cost."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import robust
from tests.house.sources import ROOT

# DESIGN's contract.
PUBLIC = (
    *("Classifier", "Oracle", "Linf", "L2", "L1", "L0", "Patch", "Verdict"),
    *("evaluate", "fit", "load_model", "load_data"),
)
HEAVY = {
    *("torchvision", "triton", "sklearn", "scipy", "matplotlib", "jinja2", "typer", "rich"),
    *("flwr", "ray", "opacus", "dp_accounting", "tenseal", "onnxruntime", "timm"),
}
MEASURE = """
import json, sys
import {before}
before = set(sys.modules)
from time import process_time
start = process_time()
import {imported}
{after}
seconds = process_time() - start
print(json.dumps([seconds, sorted({{name.split(".")[0] for name in set(sys.modules) - before}})]))
"""


def measure(before: str, imported: str, after: str = "") -> tuple[float, set[str]]:
    """CPU seconds that `imported` takes after `before`, and the top-level packages it brings with it."""
    code = MEASURE.format(before=before, imported=imported, after=after)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seconds, packages = json.loads(done.stdout)
    return seconds, set(packages)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_loads_and_is_listed(name: str) -> None:
    value = getattr(robust, name)
    assert value is getattr(importlib.import_module(robust._PUBLIC[name]), name)
    assert not isinstance(value, ModuleType)
    assert name in robust.__all__
    assert name in dir(robust)


def test_nothing_else_is_public() -> None:
    assert sorted(robust.__all__) == sorted([*PUBLIC, "__version__"])


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'robust' has no attribute 'evaluat'"):
        robust.evaluat  # noqa: B018


@pytest.mark.parametrize("name", ["evaluate", "fit"])
def test_a_function_that_shares_its_name_with_a_module_stays_the_function(name: str) -> None:
    module = importlib.import_module(f"robust.{name}")
    assert isinstance(module, ModuleType)
    assert getattr(robust, name) is getattr(module, name)


@pytest.mark.parametrize("name", ["evaluate", "fit"])
@pytest.mark.parametrize(
    "first", ["import robust.{0}", "from robust.{0} import {0}", "from robust import {0}"]
)
def test_no_order_of_imports_hides_the_function(name: str, first: str, tmp_path: Path) -> None:
    # Small modules stand in for the real ones, which would import torch.
    (tmp_path / f"{name}.py").write_text(f"def {name}(): pass\n")
    code = f"""
import robust, sys
robust.__path__.insert(0, {str(tmp_path)!r})
{first.format(name)}
import robust.{name}
from robust import {name}
assert {name} is robust.{name} is sys.modules["robust.{name}"].{name}
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_version_is_the_distribution_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert robust.__version__ == project["version"]


def test_importing_the_package_alone_brings_no_torch() -> None:
    seconds, packages = measure("sys", "robust")
    assert not packages & {"torch", "numpy", *HEAVY}
    assert seconds < 0.2


def test_the_whole_surface_loads_within_a_second_of_torch_and_brings_nothing_heavy() -> None:
    everything = "".join(f"robust.{name}\n" for name in PUBLIC)
    seconds, packages = measure("torch", "robust, robust.attacks, robust.cuda_ops", everything)
    assert not packages & HEAVY
    assert seconds < 1
