"""Robust: how far can a trained model be trusted under attack, and what does it leak?

A verdict in three lines::

    from robust import Linf, evaluate, load_data, load_model

    verdict = evaluate(load_model("zoo:digits"), load_data("digits"), threat=Linf(8 / 255), out="runs/a")
    print(verdict.clean_accuracy, verdict.robust_accuracy)

The public names load on first use, so that `import robust` costs nothing, and `robust --help` no torch.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robust.classifier import Classifier as Classifier
    from robust.data import load_data as load_data
    from robust.evaluate import evaluate as evaluate
    from robust.fit import fit as fit
    from robust.models import load_model as load_model
    from robust.oracle import Oracle as Oracle
    from robust.threat import L0 as L0
    from robust.threat import L1 as L1
    from robust.threat import L2 as L2
    from robust.threat import Linf as Linf
    from robust.threat import Patch as Patch
    from robust.verdict import Verdict as Verdict

__version__ = "0.1.0"

_HERE = Path(__file__).resolve().parent
# In a checkout the rooms (attacks/, defenses/, ...) lie beside this folder; in a wheel they lie inside it.
if (_HERE.parent / "attacks").is_dir() and not (_HERE / "attacks").is_dir():
    __path__.append(str(_HERE.parent))

_PUBLIC = {
    "Classifier": "robust.classifier",
    "L0": "robust.threat",
    "L1": "robust.threat",
    "L2": "robust.threat",
    "Linf": "robust.threat",
    "Oracle": "robust.oracle",
    "Patch": "robust.threat",
    "Verdict": "robust.verdict",
    "evaluate": "robust.evaluate",
    "fit": "robust.fit",
    "load_data": "robust.data",
    "load_model": "robust.models",
}
__all__ = ["__version__", *_PUBLIC]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'robust' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


class _Package(ModuleType):
    """The package itself, in which `fit` and `evaluate` are always the functions.

    Both are also names of submodules, and Python binds a submodule on its package when it is first imported, which
    would hide the function of the same name; that one binding is refused here.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
