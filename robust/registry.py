"""Literal tables of names, loaded lazily: how the core reaches the rooms without importing them."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from robust.errors import UnknownName


class Registry(Mapping[str, str]):
    """A literal table ``name -> "module:Object"`` whose objects are imported on first use.

    Args:
        kind: what a row is, in the singular, as errors name it ("attack").
        table: registry name to import path.
    """

    def __init__(self, kind: str, table: Mapping[str, str]) -> None:
        self.kind = kind
        self._table = dict(table)

    def __getitem__(self, name: str) -> str:
        return self._table[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def __repr__(self) -> str:
        return f"Registry({self.kind!r}, {len(self)} rows)"

    def load(self, name: str) -> Any:
        """The object behind `name`; an unknown name raises `UnknownName` with the nearest known ones."""
        if name not in self._table:
            raise UnknownName(unknown(self.kind, name, self._table))
        module, _, attribute = self._table[name].partition(":")
        return getattr(importlib.import_module(module), attribute)


def unknown(kind: str, name: str, known: Mapping[str, Any] | list[str]) -> str:
    """The one line for an unknown `name`: the nearest known names, or all of them when none is near."""
    names = list(known)
    if not names:
        return f"unknown {kind} {name!r}: this registry has no rows yet"
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"unknown {kind} {name!r}; did you mean {', '.join(near)}?"
    return f"unknown {kind} {name!r}; known are {', '.join(sorted(names))}"


def room(path: str) -> Registry:
    """The registry of a room, by its dotted path below `robust`: ``room("attacks")``, ``room("defenses.training")``."""
    registry = importlib.import_module(f"robust.{path}").REGISTRY
    assert isinstance(registry, Registry)
    return registry


def card(item: Any) -> str:
    """The first line of an object's docstring: what it is and whose paper it follows."""
    return (inspect.getdoc(item) or "").partition("\n")[0]
