"""The conditions under which a number was measured: commit, versions, device, date."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from robust import __version__

_ROOT = Path(__file__).resolve().parent.parent


def commit() -> str | None:
    """The commit that this checkout is at, with a mark where files differ from it; None for an installed package."""
    if not ((_ROOT / ".git").exists() and (_ROOT / "attacks").is_dir()):
        return None  # git would answer for whatever repository the package happens to be installed in
    command = ["git", "-C", str(_ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def conditions(device: torch.device) -> dict[str, Any]:
    """Commit, date, versions and device, JSON-ready."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    return {
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"robust": __version__, "python": platform.python_version(), "torch": torch.__version__},
        "device": {"type": device.type, "name": name, "threads": torch.get_num_threads()},
    }
