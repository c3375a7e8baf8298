"""Configurations: TOML files and plain mappings into frozen dataclasses, with errors that name file and line."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, Union

from robust.errors import ConfigError, RobustError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Where = tuple[str | int, ...]
_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", Path: "a path"}


def load_config(path: str | Path, cls: type[T]) -> T:
    """The TOML file at `path` as a `cls`, a dataclass whose fields are the allowed keys.

    Fields may be bool, int, float (also as a fraction: ``"8/255"``), str, Path, Literal, tuples, ``dict[str, ...]``,
    unions, optionals and dataclasses of these. A file that cannot be read, an unknown key, a wrong type, a missing
    key, or a value that the dataclass itself refuses raises `ConfigError`, one line that starts ``FILE:LINE:``.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot read this configuration: {reason}") from error
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        number = int(line[1]) if line else text.count("\n") + 1
        raise ConfigError(f"{path}:{number}: not valid TOML: {error}") from error
    return _Reader(str(path), _lines(text)).build(cls, table, ())


def from_mapping(table: Mapping[str, Any], cls: type[T], name: str = "config") -> T:
    """A mapping, such as a parsed JSON object, as a `cls`; the same checks, and `name` stands for the file."""
    return _Reader(name, None).build(cls, table, ())


def number(text: str) -> float:
    """The number that `text` writes, as a decimal or a fraction ("0.03", "8/255", "inf"); else `ConfigError`."""
    try:
        over, slash, under = text.partition("/")
        return float(over) / float(under) if slash else float(over)
    except (ValueError, ZeroDivisionError):
        raise ConfigError(f"{text!r} is not a number; write a decimal or a fraction such as 8/255") from None


class _Reader:
    """Turns parsed TOML into dataclasses, and knows the line of every key (None: there is no file)."""

    def __init__(self, source: str, lines: Mapping[Where, int] | None) -> None:
        self.source = source
        self.lines = lines

    def fail(self, where: Where, message: str) -> NoReturn:
        """Raise the one line for the value at `where`; an inline value has the line of its statement."""
        if self.lines is None:
            raise ConfigError(f"{self.source}: {message}")
        while where not in self.lines:
            where = where[:-1]
        raise ConfigError(f"{self.source}:{self.lines[where]}: {message}")

    def build(self, cls: type[T], table: Mapping[str, Any], where: Where) -> T:
        """A `cls` from one table."""
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
        for key in table:
            if key not in fields:
                self.fail((*where, key), f"unknown key {key!r}{_inside(where)}; {_nearest(key, fields)}")
        for name, field in fields.items():
            if name not in table and field.default is field.default_factory is dataclasses.MISSING:
                self.fail(where, f"missing key {name!r}{_inside(where)}; it is {_expected(hints[name])}")
        values = {key: self.value(hints[key], value, (*where, key)) for key, value in table.items()}
        try:
            return cls(**values)
        except (ValueError, RobustError) as error:
            self.fail(where, " ".join(str(error).split()))

    def value(self, kind: Any, value: Any, where: Where) -> Any:
        """`value` as a `kind`, a type annotation."""
        if kind in {Any, object}:
            return value
        if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(value, Mapping):
            return self.build(kind, value, where)
        origin = typing.get_origin(kind)
        if origin in {Union, types.UnionType}:
            return self.union(kind, value, where)
        if origin is Literal and any(
            value == choice and type(value) is type(choice) for choice in typing.get_args(kind)
        ):
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            return self.sequence(kind, value, where)
        if origin in {dict, Mapping} and isinstance(value, Mapping):
            item = typing.get_args(kind)[1]
            return {key: self.value(item, child, (*where, key)) for key, child in value.items()}
        if kind in _SCALARS and (converted := self.scalar(kind, value, where)) is not None:
            return converted
        self.refuse(kind, value, where)

    def scalar(self, kind: Any, value: Any, where: Where) -> Any:
        """A scalar, or None where `value` is of another type: no text is taken for an integer, no 1 for true."""
        if kind is float and isinstance(value, str):
            try:
                return number(value)
            except ConfigError as error:
                self.fail(where, f"{_name(where)}: {error}")
        if kind is float and type(value) is int:
            return float(value)
        if kind is Path and isinstance(value, (str, Path)):
            return Path(value)
        return value if type(value) is kind else None

    def union(self, kind: Any, value: Any, where: Where) -> Any:
        """The first member that takes `value`; a table goes to the only dataclass, so that its own error is shown."""
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        if value is None and len(members) < len(typing.get_args(kind)):
            return None
        if isinstance(value, Mapping):
            members = [member for member in members if dataclasses.is_dataclass(member)] or members
        if len(members) == 1:
            return self.value(members[0], value, where)
        exact = [member for member in members if type(value) is member]
        for member in exact + members:
            try:
                return self.value(member, value, where)
            except ConfigError:
                continue
        self.refuse(kind, value, where)

    def sequence(self, kind: Any, value: list[Any] | tuple[Any, ...], where: Where) -> tuple[Any, ...]:
        """An array as a tuple, of one kind of item (``tuple[int, ...]``) or of a fixed form."""
        items = typing.get_args(kind)
        if len(items) == 2 and items[1] is Ellipsis:
            items = (items[0],) * len(value)
        if len(items) != len(value):
            self.fail(where, f"{_name(where)} has {len(value)} items; it is {_expected(kind)}")
        return tuple(
            self.value(item, child, (*where, i))
            for i, (item, child) in enumerate(zip(items, value, strict=True))
        )

    def refuse(self, kind: Any, value: Any, where: Where) -> NoReturn:
        """Raise the one line for a value of a wrong type."""
        self.fail(where, f"{_name(where)} is {_shown(value)}; it must be {_expected(kind)}")


def _expected(kind: Any) -> str:
    """What a user may write for `kind`, in words."""
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in {Union, types.UnionType}:
        return " or ".join(_expected(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return "one of " + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        many = len(args) == 2 and args[1] is Ellipsis
        return f"an array ({_expected(args[0])} each)" if many else f"an array of {len(args)} items"
    if origin in {dict, Mapping} or dataclasses.is_dataclass(kind):
        return "a table"
    return f"a {getattr(kind, '__name__', kind)}"


def _shown(value: Any) -> str:
    """`value` as an error shows it: short, and never more than one line."""
    if isinstance(value, Mapping):
        return "a table"
    text = "[...]" if isinstance(value, (list, tuple)) else repr(value)
    if isinstance(value, bool):
        text = text.lower()
    if isinstance(value, float) and not math.isfinite(value):
        text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(key, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known) or 'none'}"


def _name(where: Where) -> str:
    """The dotted name of a value: ``attack.steps``, ``clients[2].eps``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")


def _inside(where: Where) -> str:
    return f" in [{_name(where)}]" if where else ""


def _lines(text: str) -> dict[Where, int]:
    """The line of every table and key of a valid TOML document, by path.

    Every statement is parsed alone, by the TOML parser itself: lines are added until it is whole. So quoted keys,
    dotted keys, texts and arrays over several lines need no grammar of our own.
    """
    found: dict[Where, int] = {(): 1}
    lengths: dict[Where, int] = {}
    header: Where = ()
    lines = text.split("\n")
    start = 0
    while start < len(lines):
        end, statement = _statement(lines, start)
        if lines[start].lstrip().startswith("["):
            header = _header(statement, lengths)
            _note(found, header, start + 1)
        else:
            for path in _paths(statement, ()):
                _note(found, header + path, start + 1)
        start = end
    return found


def _statement(lines: list[str], start: int) -> tuple[int, dict[str, Any]]:
    """The statement that begins on line `start`, parsed, and the first line after it."""
    for end in range(start + 1, len(lines) + 1):
        try:
            return end, tomllib.loads("\n".join(lines[start:end]))
        except tomllib.TOMLDecodeError:
            continue
    return len(lines), {}


def _note(found: dict[Where, int], path: Where, line: int) -> None:
    """Record `line` for `path` and for those of its parents that no line has named yet."""
    for size in range(1, len(path) + 1):
        found.setdefault(path[:size], line)


def _header(statement: dict[str, Any], lengths: dict[Where, int]) -> Where:
    """The path of ``[a.b]`` or ``[[a.b]]``; inside an array of tables it means the newest element."""
    path: Where = ()
    node: Any = statement
    while isinstance(node, dict) and node:
        key = next(iter(node))
        path, node = (*path, key), node[key]
        if isinstance(node, list):
            lengths[path] = lengths.get(path, 0) + 1
            node = node[0]
        if path in lengths:
            path = (*path, lengths[path] - 1)
    return path


def _paths(table: Mapping[str, Any], where: Where) -> list[Where]:
    """The paths of all keys in one statement, inline tables included."""
    paths: list[Where] = []
    for key, value in table.items():
        paths.append((*where, key))
        if isinstance(value, Mapping):
            paths += _paths(value, (*where, key))
    return paths
