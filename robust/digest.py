"""Hashes and atomic files: what makes a run folder checkable and a crash harmless."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.errors import RunError
from robust.oracle import Backend, Oracle


def sample_digest(x: Tensor, y: int) -> str:
    """16 hex digits of sha256 over one sample's float32 values, shape and label."""
    hasher = hashlib.sha256(repr((tuple(x.shape), int(y))).encode())
    hasher.update(x.detach().cpu().float().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()[:16]


def data_digest(samples: list[str]) -> str:
    """sha256 (hex) over the samples' digests in order."""
    return hashlib.sha256("\n".join(samples).encode()).hexdigest()


def model_digest(model: Classifier | Oracle) -> str:
    """A classifier's digest, also behind an oracle, or what another backend says; of a callable only the name."""
    if isinstance(model, Classifier):
        return model.digest()
    backend = model.backend
    return backend.digest() if isinstance(backend, (Classifier, Backend)) else f"oracle:{model.name}"


def file_digest(path: Path) -> str:
    """sha256 (hex) of a file's bytes."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def write_atomic(path: Path, content: bytes, *, secret: bool = False) -> None:
    """Writes a file that is there whole or not at all; a `secret` one only its owner may read."""
    temporary = path.with_name(f".{path.name}.part")
    mode = 0o600 if secret else 0o666  # what the user's mask leaves of it
    alone = os.O_EXCL if secret else 0
    try:
        if secret:  # a file that lies there, or a link, would keep its own mode and readers
            temporary.unlink(missing_ok=True)
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags | alone, mode)) as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        flush_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}") from error


def flush_folder(folder: Path) -> None:
    """Makes a rename in the folder last through a power cut, where folders can be flushed."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON atomically, keys in the order given."""
    write_atomic(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; a missing or broken file is one line."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunError(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds no JSON object")
    return content
