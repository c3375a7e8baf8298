"""The checkout's Python files, by the module names they have once installed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The import law's order: a layer may import itself and what stands before it.
LAYERS = ("cuda_ops", "robust", "attacks", "defenses", "federated", "experiments")
ROOMS = tuple(layer for layer in LAYERS if layer != "robust")


@dataclass(frozen=True)
class Source:
    """One Python file of the package."""

    path: str
    module: str
    tree: ast.Module
    lines: int

    @property
    def layer(self) -> str:
        """The layer a module belongs to, by its name."""
        return layer_of(self.module)


def layer_of(module: str) -> str:
    """The layer of a dotted name below `robust`."""
    room = module.split(".")[1:2]
    return room[0] if room and room[0] in ROOMS else "robust"


@cache
def sources() -> tuple[Source, ...]:
    """Every Python file of the package, parsed once."""
    return tuple(read(path) for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py")))


def read(path: Path) -> Source:
    """A file of the checkout with its module name: attacks/base.py is robust.attacks.base."""
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    parts = parts if parts[0] == "robust" else ("robust", *parts)
    text = path.read_text()
    module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Source(str(relative), module, ast.parse(text, str(relative)), text.count("\n"))


def imports(tree: ast.AST, module: str, package: bool) -> Iterator[tuple[str, str | None, int]]:
    """(module, name or None, line) of every import statement below `tree`, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")
            base = base[: len(base) - node.level + package] if node.level else []
            for alias in node.names:
                yield ".".join([*base, *filter(None, [node.module])]), alias.name, node.lineno
