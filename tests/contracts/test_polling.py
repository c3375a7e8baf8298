"""Between looks at its flags the engine asks the device nothing: a GPU would have to stop for every answer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from robust.attacks import engine
from tests.contracts.subjects import cases, make, small

STOPS = {
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "item",
    "tolist",
    "cpu",
    "nonzero",
    "numpy",
    "__contains__",
}
ASKED: list[str] = []


class Remote(Tensor):
    """A tensor that notes when its numbers are wanted by the host."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in STOPS:
            ASKED.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def polled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Looks eight turns apart, as on a GPU."""
    monkeypatch.setitem(engine.POLL, "cpu", 8)
    ASKED.clear()
    yield
    ASKED.clear()


def asked(name: str, norm: str, steps: int) -> int:
    """How often the host wants numbers of the device in an attack that breaks nothing."""
    clf, x, y = small(n=4)
    y = clf.logits(x).argmax(1)
    attack = make(name, norm, eps=1e-4, steps=steps, until="broken")
    clf.check(x)
    ASKED.clear()
    attack.run(clf, x.as_subclass(Remote), y.as_subclass(Remote), precision="original")
    return len(ASKED)


# In the others the plain operations look, for what is not finite; the kernels that a GPU has do not.
@pytest.mark.parametrize(("name", "norm"), [("pgd", "linf"), ("bim", "linf"), ("apgd-ce", "linf")])
def test_engine_does_not_wait_for_the_device_at_every_step(name: str, norm: str, polled: None) -> None:
    short, long = asked(name, norm, 16), asked(name, norm, 96)
    assert short > 0, "the last word is asked for"
    looks, watches = 80 / 8, 80 / 10  # the host looks at flags, and now and then for vanishing gradients
    assert long - short <= 2 * (looks + watches) + 2


def test_engine_on_a_cpu_looks_at_every_step() -> None:
    assert asked("pgd", "linf", 96) - asked("pgd", "linf", 16) >= 80


@pytest.mark.parametrize(("name", "norm"), cases())
def test_polling_changes_no_outcome(
    name: str, norm: str, polled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clf, x, y = small()
    attack = make(name, norm, until="broken")
    found = {}
    for precision in ("original", "float32"):
        seldom = attack.run(clf, x, y, seed=7, precision=precision)
        assert bool(attack.threat.inside(seldom.x_adv, x, clf.bounds).all())
        assert bool((seldom.success == (clf.logits(seldom.x_adv).argmax(1) != y)).all())
        found[precision] = seldom.success
    monkeypatch.setitem(engine.POLL, "cpu", 1)
    always = attack.run(clf, x, y, seed=7, precision="original")
    for precision, success in found.items():
        assert int((always.success & ~success).sum()) <= (precision != "original"), precision
