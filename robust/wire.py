"""How points and answers travel in JSON: as nested lists, or as base64 of little-endian values; both are exact.

A batch is ``{"inputs": ARRAY}``, an answer ``{"scores": ARRAY}`` or ``{"labels": ARRAY}``. An ARRAY is a nested list of
numbers, or ``{"shape": [...], "type": "float32" or "int64", "base64": "..."}``. Numbers of a list are written so that a
float32 comes back bit for bit.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Encoding = Literal["json", "base64"]
ENCODINGS: tuple[Encoding, ...] = ("json", "base64")
_TYPES = {"float32": "<f4", "int64": "<i8"}


def pack(values: Tensor, encoding: Encoding) -> Any:
    """An array of float32 or int64 as JSON-ready data."""
    array = values.detach().cpu().numpy()
    if encoding == "json":
        return array.tolist()
    name = "int64" if array.dtype.kind in "iu" else "float32"
    raw = array.astype(_TYPES[name]).tobytes()
    return {"shape": list(array.shape), "type": name, "base64": base64.b64encode(raw).decode()}


def unpack(data: Any) -> Tensor:
    """The array that `pack` packed, as float32 or int64.

    Raises:
        ValueError: it is none, in one line; a number beyond float32 becomes infinite.
    """
    return _from_base64(data) if isinstance(data, dict) else _from_lists(data)


def _from_lists(data: Any) -> Tensor:
    if not isinstance(data, list):
        raise ValueError(f"{type(data).__name__} where a list of numbers is right")
    try:
        array = np.asarray(data)
    except (ValueError, OverflowError):
        raise ValueError("a list whose rows have different lengths") from None
    if array.dtype.kind not in "fiu":
        raise ValueError("a list that holds something else than numbers")
    with np.errstate(over="ignore"):
        return torch.from_numpy(array.astype(np.int64 if array.dtype.kind in "iu" else np.float32))


def _from_base64(data: dict[str, Any]) -> Tensor:
    shape, kind = data.get("shape"), data.get("type")
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not whole or kind not in _TYPES or not isinstance(data.get("base64"), str):
        raise ValueError("an array without shape, type (float32 or int64) and base64")
    assert isinstance(shape, list)
    try:
        raw = base64.b64decode(data["base64"], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("an array that is no base64") from None
    flat = np.frombuffer(raw, dtype=np.uint8)
    size = np.dtype(_TYPES[kind]).itemsize
    if len(flat) != math.prod(shape) * size:
        raise ValueError(f"{len(flat)} bytes, which are no {kind} array of the shape {tuple(shape)}")
    array = np.frombuffer(raw, dtype=_TYPES[kind]).reshape(shape)
    return torch.from_numpy(array.astype(np.float32 if kind == "float32" else np.int64))


def read_object(raw: bytes) -> dict[str, Any]:
    """A JSON object from bytes; anything else is a ValueError of one line."""
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError):
        raise ValueError("no JSON") from None
    if not isinstance(content, dict):
        raise ValueError("JSON, but no object")
    return content
