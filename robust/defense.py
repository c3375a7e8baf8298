"""What a defence is: a Classifier around a Classifier that says how it must be attacked.

A defence may hide its gradient, by steps that have none or by randomness; no defence is credited for that. One that
declares `bpda` answers every question for a gradient with a substitute's (Athalye et al. 2018, arXiv:1802.00420), and
of one that declares `randomised` gradients are averaged and outcomes are a majority over keyed draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.errors import RobustError
from robust.rng import Draws


@dataclass(frozen=True)
class Defense:
    """A transform of the inputs; its fields are the hyper-parameters. `defense(clf)` is the defended classifier.

    Attributes:
        name: the registry's name.
        differentiable: autograd through `transform` gives the gradient, almost everywhere.
        bpda: the backward pass is `substitute`'s, since the transform's own gradient vanishes or does not exist.
        randomised: it draws anew in every forward, so that attacks average over draws (EOT).
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = "transform"
    differentiable: ClassVar[bool] = True
    bpda: ClassVar[bool] = False
    randomised: ClassVar[bool] = False

    def __call__(self, clf: Classifier) -> Defended:
        """The classifier behind this defence: what comes in is transformed before `clf` sees it."""
        return Defended(clf, self)

    def transform(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """What the defence makes of x (N, C, H, W) in the box `bounds`; what it draws is a function of `key`."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it does")

    def substitute(self, x: Tensor, bounds: tuple[float, float], key: int) -> Tensor:
        """A differentiable stand-in for `transform`, of the same shape, whose gradient BPDA takes: x itself."""
        return x

    def apply(self, x: Tensor, bounds: tuple[float, float], key: int, aware: bool = True) -> Tensor:
        """`transform`, whose gradient is the substitute's where that is declared and the attack is `aware` of it."""
        if not len(x):  # no transform need know of an empty batch, and some change the shape
            return self.transform(x.new_full((1, *x.shape[1:]), bounds[0]), bounds, key)[:0]
        if not (self.bpda and aware and torch.is_grad_enabled() and x.requires_grad):
            return self.transform(x, bounds, key)
        with torch.no_grad():
            value = self.transform(x.detach(), bounds, key)
        return substituted(value, self.substitute(x, bounds, key))

    def describe(self) -> dict[str, Any]:
        """Name, parameters and declaration, for manifests."""
        parameters = {item.name: getattr(self, item.name) for item in fields(self)}
        flags = ("differentiable", "bpda", "randomised")
        return {"name": self.name, "parameters": parameters, **{flag: getattr(self, flag) for flag in flags}}

    @classmethod
    def attacked_by(cls) -> str:
        """How an attack that knows of it takes its gradient."""
        return _attacked_by(cls.bpda, cls.randomised)

    def draws(self, x: Tensor, key: int) -> Draws:
        """The keyed source of this defence's draws, one row for each of x."""
        return Draws(key, self.name, torch.arange(len(x), device=x.device))

    def require(self, holds: bool, what: str) -> None:
        """Raises one line, for a parameter that makes no sense."""
        if not holds:
            raise RobustError(f"{self.name}: {what}")


def substituted(value: Tensor, substitute: Tensor) -> Tensor:
    """`value`, bit for bit, with the gradient of `substitute`, a tensor of the same shape (BPDA)."""
    found: Tensor = _Substituted.apply(value, substitute)
    return found


class _Substituted(torch.autograd.Function):
    """The first tensor, with the second one's gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, substitute: Tensor) -> Tensor:
        """The value, bit for bit."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[None, Tensor]:
        """All to the substitute."""
        return None, gradients[0]


class Defended(Classifier):
    """A classifier behind one defence; a chain of them is several. The module is the undefended one's, and untouched.

    What it draws comes from torch's default generator, one key a forward, so that `robust.rng.seeded` keys it, and
    equally on every device.

    Attributes:
        inner: the classifier behind it, which may be defended itself.
        defense: what x meets before `inner`.
        cost: shared with `inner`.
    """

    def __init__(self, inner: Classifier, defense: Defense) -> None:
        if not isinstance(inner, Classifier):
            raise RobustError(
                f"{defense.name} wraps a Classifier, not {type(inner).__name__}; wrap the module first"
            )
        super().__init__(
            inner.module,
            inner.bounds,
            inner.mean.flatten().tolist(),
            inner.std.flatten().tolist(),
            inner.device,
        )
        self.inner, self.defense, self.cost = inner, defense, inner.cost
        self.name = f"{self.undefended.name} behind {', '.join(item.name for item in self.defenses)}"
        self.randomised = inner.randomised or defense.randomised
        self._aware = True

    def __repr__(self) -> str:
        return f"{self.inner!r} behind {self.defense!r}"

    @property
    def defenses(self) -> list[Defense]:
        """The chain in the order in which an input meets it."""
        rest = self.inner.defenses if isinstance(self.inner, Defended) else []
        return [self.defense, *rest]

    @property
    def undefended(self) -> Classifier:
        """The classifier behind the whole chain."""
        return self.inner.undefended if isinstance(self.inner, Defended) else self.inner

    @property
    def differentiable(self) -> bool:
        """Whether autograd goes through the whole chain."""
        return all(item.differentiable for item in self.defenses)

    @property
    def bpda(self) -> bool:
        """Whether a part of the chain needs a substitute's gradient."""
        return any(item.bpda for item in self.defenses)

    def attacked_by(self) -> str:
        """How an attack that knows of the chain takes its gradient."""
        return _attacked_by(self.bpda, any(item.randomised for item in self.defenses))

    def normalise(self, x: Tensor) -> Tensor:
        """x through the defence, then as `inner` normalises it."""
        key = int(torch.randint(1 << 62, ())) if self.defense.randomised else 0
        return self.inner.normalise(self.defense.apply(x.to(self.device), self.bounds, key, self._aware))

    @contextmanager
    def unaware(self) -> Iterator[None]:
        """While open, gradients are autograd's own, as an attack that does not know of the defence takes them."""
        chain = [self]
        while isinstance(chain[-1].inner, Defended):
            chain.append(chain[-1].inner)
        before = [part._aware for part in chain]
        try:
            for part in chain:
                part._aware = False
            yield
        finally:
            for part, aware in zip(chain, before, strict=True):
                part._aware = aware

    def digest(self) -> str:
        """sha256 (hex) of the undefended model's identity and of the defence with its parameters."""
        return hashlib.sha256(f"{self.inner.digest()}/{self.defense!r}".encode()).hexdigest()


def compose(clf: Classifier, defenses: Sequence[Defense]) -> Classifier:
    """The classifier behind several defences, which an input meets in the order given; itself if there are none."""
    for defense in reversed(defenses):
        clf = defense(clf)
    return clf


def describe(model: object) -> list[dict[str, Any]]:
    """The defences of a model by their declarations; empty where there are none."""
    return [item.describe() for item in model.defenses] if isinstance(model, Defended) else []


def _attacked_by(bpda: bool, randomised: bool) -> str:
    ways = [name for name, declared in (("BPDA", bpda), ("EOT", randomised)) if declared]
    return " + ".join(ways) or "autograd"
