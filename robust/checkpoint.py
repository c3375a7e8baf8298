"""Checkpoints of a training: one safetensors file with weights, optimizer, average and place, written atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robust.digest import write_atomic
from robust.errors import RobustError, RunError

CHECKPOINT = "checkpoint.safetensors"
WEIGHTS = "model.safetensors"
RECORD = "train.json"


@dataclass
class Place:
    """How far a training has come.

    Attributes:
        step: optimizer steps taken.
        loss_sum: sum over the samples seen in the unfinished epoch.
        seconds: time spent, over all interruptions.
        history: one entry per finished epoch.
    """

    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)


def prepare_folder(out: str | Path, resume: bool) -> Path:
    """The run folder `out`, made and proved writable; one that holds a training is only taken to `resume` it."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}); choose another out folder") from None
    if not resume and (folder / CHECKPOINT).exists():
        raise RunError(f"{folder} already holds a training; resume it, or choose another out folder")
    return folder


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    secret: bool = False,
) -> None:
    """Write a safetensors file that is either whole or absent: a temporary file, flushed to disk, then renamed.

    A `secret` one is for its owner's eyes only.
    """
    copies = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    write_atomic(path, save(copies, metadata=dict(metadata or {"format": "pt"})), secret=secret)


def save_checkpoint(
    folder: Path,
    place: Place,
    identity: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    secret: bool = False,
) -> None:
    """The tensors that the next step depends on, the place, and the `identity` of the training they belong to."""
    header = {"place": json.dumps(vars(place)), "identity": json.dumps(identity, sort_keys=True)}
    write_tensors(folder / CHECKPOINT, tensors, header, secret=secret)


def load_checkpoint(
    folder: Path,
    identity: Mapping[str, Any],
    restore: Callable[[dict[str, Tensor]], None],
    ended: Mapping[str, Any] | None = None,
) -> Place:
    """Hand the tensors of the checkpoint in `folder`, if there is one, to `restore`; how far the training had come.

    Args:
        ended: the identity that the checkpoint may have instead, such as one that says less of its data.

    Raises:
        RunError: the file is damaged, or belongs to a training with another `identity`.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        return Place()
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        place = Place(**json.loads(header["place"]))
        _same_training(path, json.loads(header["identity"]), _plain(identity), _plain(ended or identity))
        restore(tensors)
    except RobustError:
        raise
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        line = " ".join(str(error).split())[:200]
        raise RunError(f"{path} cannot be resumed from ({line}); delete it to start again") from None
    return place


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def named(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `below` undoes."""
    return {prefix + name: value for name, value in tensors.items()}


def _plain(identity: Mapping[str, Any]) -> Any:
    """As it is read again."""
    return json.loads(json.dumps(identity))


def _same_training(
    path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any], ended: Mapping[str, Any]
) -> None:
    for name in {**stored, **wanted}:
        if stored.get(name) not in (wanted.get(name), ended.get(name)):
            raise RunError(
                f"{path} belongs to a training with {name}={stored.get(name)}, not {wanted.get(name)}; "
                "resume with the same, or choose another out folder"
            )
