"""The import law: cuda_ops <- robust <- attacks <- defenses <- federated <- experiments, and no cycles."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable

import pytest

import robust
from tests.house.sources import LAYERS, ROOMS, ROOT, Source, imports, layer_of, read, sources

Check = Callable[[Source], list[str]]


def upward(source: Source) -> list[str]:
    """Imports of a layer above the file's own, wherever in the file they stand, types included."""
    rank = LAYERS.index(source.layer)
    package = source.path.endswith("__init__.py")
    found = []
    for module, name, line in imports(source.tree, source.module, package):
        if module.split(".")[0] != "robust":
            continue
        target = layer_of(f"{module}.{name}" if module == "robust" and name in ROOMS else module)
        if LAYERS.index(target) > rank:
            found.append(f"{source.path}:{line} imports {target} from {source.layer}")
    return found


def by_path(source: Source) -> list[str]:
    """Imports of a room by its folder, which would load its modules a second time under another name."""
    return [
        f"{source.path}:{line} imports {module}: write robust.{module}"
        for module, _, line in imports(source.tree, source.module, source.path.endswith("__init__.py"))
        if module.split(".")[0] in ROOMS or module.startswith("robust.robust")
    ]


def by_string(source: Source) -> list[str]:
    """Literal names of a higher layer's module handed to `import_module`: registries are the only way up."""
    return [
        f"{source.path}:{node.lineno} imports {argument.value} by name"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func).split(".")[-1] in {"import_module", "__import__"}
        for argument in node.args[:1]
        if isinstance(argument, ast.Constant) and str(argument.value).startswith("robust.")
        if LAYERS.index(layer_of(str(argument.value))) > LAYERS.index(source.layer)
    ]


def at_import(tree: ast.Module) -> ast.Module:
    """The statements that run when a module is imported: no function bodies, no TYPE_CHECKING blocks."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node: ast.If) -> ast.AST | None:
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(ast.parse(ast.unparse(tree)))


def graph(files: Iterable[Source]) -> dict[str, set[str]]:
    """Which module explicitly imports which while it is imported itself."""
    files = list(files)
    known = {source.module for source in files}
    edges: dict[str, set[str]] = {}
    for source in files:
        edges[source.module] = set()
        for module, name, _ in imports(
            at_import(source.tree), source.module, source.path.endswith("__init__.py")
        ):
            target = f"{module}.{name}" if name and f"{module}.{name}" in known else module
            if module == "robust" and name in robust._PUBLIC:
                target = robust._PUBLIC[name]
            if target in known and target != source.module:
                edges[source.module].add(target)
    return edges


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """One import cycle, or nothing."""
    done: set[str] = set()

    def search(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        found = next(filter(None, (search(child, [*trail, node]) for child in sorted(edges[node]))), [])
        done.add(node)
        return found

    return next(filter(None, (search(node, []) for node in sorted(edges))), [])


@pytest.mark.parametrize("check", [upward, by_path, by_string])
def test_no_file_of_the_package_breaks_the_law(check: Check) -> None:
    assert [line for source in sources() for line in check(source)] == []


def test_no_test_imports_a_room_by_its_folder() -> None:
    files = [read(path) for path in sorted((ROOT / "tests").rglob("*.py"))]
    assert [line for source in files for line in by_path(source)] == []


def test_no_module_imports_itself_through_others() -> None:
    assert cycle(graph(sources())) == []


def source(module: str, text: str) -> Source:
    """A file that does not exist, for what the checks must refuse."""
    return Source(module.removeprefix("robust.").replace(".", "/") + ".py", module, ast.parse(text), 1)


@pytest.mark.parametrize(
    ("module", "text", "check"),
    [
        ("robust.evaluate", "from robust.attacks import PGD", upward),
        ("robust.evaluate", "def f():\n    import robust.defenses.training", upward),
        ("robust.evaluate", "from robust import federated", upward),
        ("robust.attacks.base", "from ..defenses import get", upward),
        ("robust.cuda_ops.reference", "from robust.threat import Linf", upward),
        ("robust.cuda_ops.reference", "from robust import Linf", upward),
        ("robust.attacks.base", "if TYPE_CHECKING:\n    from robust.experiments import x", upward),
        ("robust.attacks.base", "import attacks.engine", by_path),
        ("robust.attacks.base", "from cuda_ops import philox", by_path),
        ("robust.attacks.base", "import robust.robust.threat", by_path),
        ("robust.evaluate", "importlib.import_module('robust.attacks')", by_string),
    ],
)
def test_the_checks_see_what_breaks_the_law(module: str, text: str, check: Check) -> None:
    assert len(check(source(module, text))) == 1


def test_the_checks_allow_what_the_law_allows() -> None:
    allowed = source(
        "robust.attacks.base",
        "from robust import Linf\nfrom robust.cuda_ops import philox\nfrom .engine import run\nimport torch",
    )
    assert [line for check in (upward, by_path, by_string) for line in check(allowed)] == []


def test_a_cycle_is_seen_and_a_late_import_is_none() -> None:
    threat = source("robust.threat", "from robust.classifier import Classifier")
    for text, expected in (
        ("from robust import Linf", True),
        ("def f():\n    from robust import Linf", False),
    ):
        found = cycle(graph([threat, source("robust.classifier", text)]))
        assert bool(found) is expected
