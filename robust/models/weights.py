"""Weights from files: safetensors, or state dicts that are read without running anything."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robust.data.fetch import one_line
from robust.errors import ModelError

WRAPPERS = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the state dict
PREFIXES = ("module.", "_orig_mod.")  # DataParallel's and torch.compile's
SHOWN = 3


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, unwrapped and without the prefixes of parallel or compiled modules.

    A pickle is read with `weights_only=True` and nothing else: one that needs more is refused, since it could run code.
    """
    if not path.is_file():
        raise ModelError(f"weights {path} {'are a folder' if path.is_dir() else 'do not exist'}; give a file")
    content = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    state = _unwrap(content)
    if state is None:
        raise ModelError(f"weights {path} hold {_described(content)}, not a state dict of tensors by name")
    for prefix in (*PREFIXES, *PREFIXES):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"weights {path} are not a readable safetensors file: {one_line(error)}") from None


def _torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        needs = re.search(r"GLOBAL (\S+)", str(error))
        if needs:
            raise ModelError(
                f"weights {path} are a pickle that would import {needs[1]}: not opened, since it could run "
                "code; save model.state_dict(), or a safetensors file"
            ) from None
        raise ModelError(
            f"weights {path} are neither safetensors nor a state dict saved by torch.save"
        ) from None
    except (
        RuntimeError,
        OSError,
        EOFError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        raise ModelError(
            f"weights {path} cannot be read as safetensors or as a state dict saved by torch.save: {one_line(error)}"
        ) from None


def _unwrap(content: object) -> dict[str, Tensor] | None:
    """The state dict itself, or the one a checkpoint keeps under a usual name."""
    if not isinstance(content, Mapping) or not content:
        return None
    if all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()):
        return dict(content)
    found = (_unwrap(content[name]) for name in WRAPPERS if name in content)
    return next((state for state in found if state is not None), None)


def _described(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    return f"the keys {_few([str(key) for key in content])}" if content else "nothing"


def outputs(module: nn.Module, state: Mapping[str, Tensor], classes: int) -> int:
    """How many classes the weights have, if that is all in which they differ from a module built with `classes`."""
    own = module.state_dict()
    pairs = [(own[key].shape, value.shape) for key, value in state.items() if key in own]
    different = [(mine, theirs) for mine, theirs in pairs if mine != theirs]
    only_outputs = all(
        len(mine) == len(theirs) > 0 and mine[0] == classes and mine[1:] == theirs[1:]
        for mine, theirs in different
    )
    counts = {theirs[0] for _, theirs in different if len(theirs)}
    return counts.pop() if only_outputs and len(counts) == 1 else classes


def fit_weights(module: nn.Module, state: Mapping[str, Tensor], label: str, path: Path) -> None:
    """Load the state into the module; every name and shape must fit, batch norm's counters aside."""
    own = module.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own and not key.endswith("num_batches_tracked")]
    shapes = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in state.items()
        if key in own and isinstance(own[key], Tensor) and own[key].shape != value.shape
    ]
    faults = [
        f"{len(names)} {what} ({_few(names)})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise ModelError(f"weights {path} do not fit {label}: {'; '.join(faults)}")
    module.load_state_dict(state, strict=False)


def _few(names: list[str]) -> str:
    rest = ", ..." if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + rest
