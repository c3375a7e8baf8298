"""Models from a Python file: a function, class or module in it, by path."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from robust.classifier import Classifier
from robust.data.fetch import one_line
from robust.errors import ModelError, UnknownName
from robust.models.sources import Source, Wanted
from robust.models.weights import fit_weights, read_weights
from robust.registry import unknown


def from_file(path: Path, name: str, wanted: Wanted) -> Source:
    """What `name` of the file makes: called without arguments, it returns an `nn.Module` or a Classifier.

    The file's own folder can be imported from meanwhile, as when Python runs the file.
    """
    if not path.is_file():
        raise ModelError(
            f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; a model is FILE.py:FACTORY"
        )
    if not name.isidentifier():
        raise ModelError(f"{path}:{name} names no factory; write {path}:FACTORY")
    with _importable(path.resolve().parent):
        found = _attribute(_load(path), name, path)
        model = found if isinstance(found, nn.Module | Classifier) else _call(found, name, path)
    if not isinstance(model, nn.Module | Classifier):
        raise ModelError(
            f"{path}:{name} returned {type(model).__name__}; expected a torch.nn.Module or a Classifier"
        )
    if wanted.weights is not None:
        module = model.module if isinstance(model, Classifier) else model
        fit_weights(module, read_weights(wanted.weights), f"{path.name}:{name}", wanted.weights)
    return Source(model, f"{path.name}:{name}")


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _load(path: Path) -> ModuleType:
    """The file as a module under a private name, so that it hides no other module."""
    private = f"_robust_model_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    spec = importlib.util.spec_from_file_location(private, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[private] = module  # dataclasses and pickle look a class's module up by name
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        del sys.modules[private]
        raise ModelError(f"{path} cannot be loaded: {_reason(error, path)}") from error
    return module


def _attribute(module: ModuleType, name: str, path: Path) -> Any:
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if _makes_models(value, module)]
        raise UnknownName(
            f"{path}: {unknown('factory', name, own)}" if own else f"{path} defines no {name!r}"
        )
    return getattr(module, name)


def _makes_models(value: object, module: ModuleType) -> bool:
    """Whether a value of the module looks like a factory of its own, for the error that lists them."""
    defined = inspect.isfunction(value) or inspect.isclass(value)
    return (defined and getattr(value, "__module__", "") == module.__name__) or isinstance(value, nn.Module)


def _call(factory: Any, name: str, path: Path) -> object:
    if not callable(factory):
        raise ModelError(
            f"{path}:{name} is no function but {type(factory).__name__}; expected one that returns a torch.nn.Module"
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelError(f"{path}:{name} cannot be called without arguments: {one_line(error)}") from None
    except ValueError:
        pass  # some callables of extensions have no signature
    try:
        return factory()
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ModelError(f"{path}:{name} failed: {_reason(error, path)}") from error


def _reason(error: BaseException, path: Path) -> str:
    """The error's type and text, and the line of the file where it arose."""
    if isinstance(error, SyntaxError):
        return f"line {error.lineno}: {error.msg}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
    text = " ".join(str(error).split())
    name = type(error).__name__ + (f": {one_line(error)}" if text else "")
    return f"line {lines[-1]}: {name}" if lines else name
