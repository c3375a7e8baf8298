"""Documents and sizes: what is public says what it is and what it takes, and fits on a screen."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator

import pytest

from tests.house.sources import ROOT, Source, sources

Check = Callable[[Source], list[str]]
Function = ast.FunctionDef | ast.AsyncFunctionDef
SOURCES = sources()
PATHS = [source.path for source in SOURCES]


def definitions(source: Source) -> Iterator[tuple[ast.ClassDef | Function, ast.ClassDef | None]]:
    """Every class, function and method of a module (with its class); what is inside functions is nobody else's."""
    for node in source.tree.body:
        if isinstance(node, ast.ClassDef | Function):
            yield node, None
        if isinstance(node, ast.ClassDef):
            yield from ((child, node) for child in node.body if isinstance(child, Function))


def classes() -> dict[str, list[ast.ClassDef]]:
    """The classes of the package by their names."""
    found: dict[str, list[ast.ClassDef]] = {}
    for source in SOURCES:
        for node in source.tree.body:
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(node)
    return found


CLASSES = classes()


def inherited(method: str, owner: ast.ClassDef) -> bool:
    """Whether a base class of the package documents this method already."""
    bases = [
        node
        for base in owner.bases
        for node in CLASSES.get(ast.unparse(base).split("[")[0].split(".")[-1], [])
    ]
    return any(
        inherited(method, base)
        or any(
            isinstance(child, Function) and child.name == method and ast.get_docstring(child)
            for child in base.body
        )
        for base in bases
        if base is not owner
    )


def undocumented(source: Source) -> list[str]:
    """What is public in a module and does not say what it is."""
    missing = [] if ast.get_docstring(source.tree) else [f"{source.path}:1 the module"]
    for node, owner in definitions(source):
        public = not node.name.startswith("_") and not (owner and owner.name.startswith("_"))
        if public and not ast.get_docstring(node) and not (owner and inherited(node.name, owner)):
            missing.append(f"{source.path}:{node.lineno} {node.name}")
    return missing


def untyped(source: Source) -> list[str]:
    """The public functions and methods of which a parameter or the result has no type."""
    missing = []
    for node, owner in definitions(source):
        if isinstance(node, ast.ClassDef) or (node.name.startswith("_") and not node.name.startswith("__")):
            continue
        static = any(ast.unparse(decorator) == "staticmethod" for decorator in node.decorator_list)
        arguments = [*node.args.posonlyargs, *node.args.args][1 if owner and not static else 0 :]
        arguments += [*node.args.kwonlyargs, *filter(None, [node.args.vararg, node.args.kwarg])]
        bare = [argument.arg for argument in arguments if argument.annotation is None]
        bare += [] if node.returns else ["return"]
        missing += [f"{source.path}:{node.lineno} {node.name}: {name}" for name in bare]
    return missing


def long(source: Source) -> list[str]:
    """The functions that do not fit on a screen."""
    return [
        f"{source.path}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(source.tree)
        if isinstance(node, Function) and (node.end_lineno or 0) - node.lineno >= 60
    ]


@pytest.mark.parametrize("check", [undocumented, untyped, long])
def test_every_module_is(check: Check) -> None:
    assert [line for source in SOURCES for line in check(source)] == []


def test_no_file_has_over_400_lines() -> None:
    tests = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in (ROOT / "tests").rglob("*.py")
    }
    lines = {source.path: source.lines for source in SOURCES} | tests
    assert {path: count for path, count in lines.items() if count > 400} == {}


def test_every_folder_with_python_is_a_package() -> None:
    folders = {(ROOT / path).parent for path in PATHS}
    assert [
        str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()
    ] == []


def source(text: str) -> Source:
    """A module that does not exist."""
    return Source("robust/x.py", "robust.x", ast.parse(text), text.count("\n"))


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (undocumented, "x = 1"),
        (undocumented, '"""M."""\ndef f(): ...'),
        (undocumented, '"""M."""\nclass C: ...'),
        (undocumented, '"""M."""\nclass C:\n    """C."""\n    def f(self): ...'),
        (untyped, "def f(x) -> None: ..."),
        (untyped, "def f(x: int): ..."),
        (untyped, "def f(*x) -> None: ..."),
        (untyped, "class C:\n    def __init__(self, x) -> None: ..."),
        (long, "def f():\n" + "    x = 1\n" * 60),
    ],
)
def test_the_checks_see_what_is_missing(check: Check, text: str) -> None:
    assert len(check(source(text))) == 1


def test_the_checks_let_private_things_be() -> None:
    text = '"""M."""\ndef _f(x): ...\nclass _C:\n    def f(self) -> None: ...\n'
    text += 'class D:\n    """D."""\n    def _f(self): ...\n'
    assert [line for check in (undocumented, untyped, long) for line in check(source(text))] == []
