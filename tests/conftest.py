"""What every test may use: the optional shared data, a browser, and a machine-independent number of threads."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path

import pytest

# Before torch is imported, and for child processes too: small tensors are slower on many threads than on two.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared data and weights, which is no part of the repository: $ROBUST_SHARED or ../shared."""
    folder = Path(os.environ.get("ROBUST_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data in {folder}; name its folder in ROBUST_SHARED")
    return folder


@pytest.fixture(scope="session")
def mnist_root(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root in which torchvision finds MNIST."""
    source = shared / "data" / "mnist"
    if not source.is_dir():
        pytest.skip(f"no MNIST in {source}")
    target = tmp_path_factory.mktemp("data")
    (target / "MNIST").mkdir()
    (target / "MNIST" / "raw").symlink_to(source.resolve())
    return target


@pytest.fixture(scope="session")
def cifar10_test(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CIFAR-10 test images as an image folder, unpacked once a session."""
    archive = shared / "data" / "cifar10-test.tar.gz"
    if not archive.is_file():
        pytest.skip(f"no CIFAR-10 test images: {archive} is missing")
    target = tmp_path_factory.mktemp("images")
    with tarfile.open(archive) as images:
        images.extractall(target, filter="data")
    return target / "cifar10" / "test"


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of an installed Chromium: $ROBUST_CHROMIUM or the first on the path."""
    found = os.environ.get("ROBUST_CHROMIUM") or next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        pytest.skip("no Chromium here: browser tests need `apt-get install chromium` or ROBUST_CHROMIUM")
    pytest.importorskip("playwright.sync_api", reason="browser tests need the extra `test` (playwright)")
    return found
