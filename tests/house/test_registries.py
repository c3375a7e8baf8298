"""Registries: every room has its pair, every row loads and has a card, every typo is answered."""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest

from robust.errors import UnknownName
from robust.registry import Registry, card, room
from tests.house.sources import sources

# DESIGN's registries, each with the pair REGISTRY and get.
ROOMS = (
    *("attacks", "attacks.poisoning", "attacks.privacy", "defenses", "defenses.training"),
    *(
        f"federated.{part}"
        for part in ("strategies", "aggregation", "malicious", "compression", "partitions", "engines")
    ),
    *("metrics", "corruptions", "losses"),
)


def tables() -> list[tuple[str, str]]:
    """(module, name) of every registry that a module of the package makes."""
    return [
        (source.module, node.targets[0].id)
        for source in sources()
        for node in source.tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        if isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "Registry"
    ]


def registry(table: tuple[str, str]) -> Registry:
    """The registry of that module and name."""
    found = getattr(importlib.import_module(table[0]), table[1])
    assert isinstance(found, Registry)
    return found


TABLES = tables()
ROWS = [(table, name) for table in TABLES for name in registry(table)]


@pytest.mark.parametrize("path", ROOMS)
def test_a_room_has_its_pair(path: str) -> None:
    module = importlib.import_module(f"robust.{path}")
    assert (f"robust.{path}", "REGISTRY") in TABLES
    assert room(path) is module.REGISTRY
    assert module.get == module.REGISTRY.load


@pytest.mark.parametrize(("table", "name"), ROWS, ids=[f"{table[0]}-{name}" for table, name in ROWS])
def test_a_row_loads_and_has_a_card(table: tuple[str, str], name: str) -> None:
    item = registry(table).load(name)
    line = card(item)
    assert 10 < len(line) <= 120, f"{name}: its card is {line!r}"
    if inspect.isclass(item):
        assert item.__doc__, f"{name}: its card is its base class's"
        assert not item.__doc__.startswith(f"{item.__name__}("), f"{name}: its card is a generated signature"


@pytest.mark.parametrize(("table", "name"), ROWS, ids=[f"{table[0]}-{name}" for table, name in ROWS])
def test_a_name_is_written_as_users_write_it(table: tuple[str, str], name: str) -> None:
    assert name == name.lower()
    assert name.isascii()
    assert not set(name) & set("_ /:"), "words are joined by hyphens"


@pytest.mark.parametrize("table", TABLES, ids=".".join)
def test_a_typo_is_answered_with_the_nearest_names(table: tuple[str, str]) -> None:
    rows = registry(table)
    name = next(iter(rows), "anything")
    with pytest.raises(UnknownName) as caught:
        rows.load(f"{name}x")
    line = str(caught.value)
    assert "\n" not in line
    assert (name if rows else "no rows yet") in line


@pytest.mark.parametrize("path", ["attacks", "attacks.poisoning", "attacks.privacy"])
def test_an_attack_s_card_names_its_paper_with_the_year(path: str) -> None:
    cards = {name: card(room(path).load(name)) for name in room(path)}
    assert {name: line for name, line in cards.items() if not any(c.isdigit() for c in line)} == {}
