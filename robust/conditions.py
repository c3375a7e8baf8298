"""The conditions under which a number was measured: commit, versions, device, date."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from robust import __version__

_ROOT = Path(__file__).resolve().parent.parent


def commit_of(folder: Path) -> str:
    """The commit that a checkout is at, with a mark where files differ from it.

    Raises:
        OSError, subprocess.CalledProcessError: there is no git, or no checkout.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """The commit of this checkout; the version of an installed package."""
    # In an installed package git would answer for whatever repository it happens to lie in.
    if (_ROOT / ".git").exists() and (_ROOT / "attacks").is_dir():
        try:
            return commit_of(_ROOT)
        except (OSError, subprocess.CalledProcessError):
            pass
    return f"version {__version__}"


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(named), platform.processor() or platform.machine())


def conditions(device: torch.device) -> dict[str, Any]:
    """Commit, date, device and versions, JSON-ready: what a number means nothing without."""
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": {"type": device.type, "name": device_name(device), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "robust": __version__},
    }
