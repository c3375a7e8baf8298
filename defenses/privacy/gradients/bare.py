"""Per-sample gradients of parameters without a layer of a known kind: the module is differentiated sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from robust.defenses.privacy.gradients.parts import Rows
from robust.defenses.privacy.gradients.rule import Parts
from robust.errors import ModelError, first_line


class Bare:
    """A module that uses parameters of its own in ways that only its forward knows.

    Its forward runs once more, under `torch.func.vmap`; it must treat samples independently and alike, and draw no
    random numbers.
    """

    def __init__(self, module: nn.Module, original: Callable[..., Any], names: tuple[str, ...]) -> None:
        self.module, self.original, self.names = module, original, names

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int | None) -> Call:
        """The forward in training, with the parameters out of autograd's graph."""
        values = {name: getattr(self.module, name).detach() for name in self.names}
        with swapped(self.module, values):
            return Call(self, args, kwargs, rows, self.original(*args, **kwargs))


class Call:
    """One forward of such a module: what went in, what came out."""

    def __init__(
        self, bare: Bare, args: tuple[Any, ...], kwargs: dict[str, Any], rows: int | None, output: Any
    ) -> None:
        self.bare = bare
        self.outputs, self._shape = tree_flatten(output)
        given, self._given = tree_flatten((args, kwargs))
        self.inputs = [one.detach() if isinstance(one, Tensor) else one for one in given]
        self._versions = [one._version if isinstance(one, Tensor) else 0 for one in self.inputs]
        self._rows = rows

    def result(self, outputs: Sequence[Any]) -> Any:
        """The module's output, with other tensors in it."""
        return tree_unflatten(list(outputs), self._shape)

    def parts(self, grads: Sequence[Tensor], name: str) -> Parts:
        """Per-sample gradients from the outputs' gradients.

        Raises:
            ModelError: the module cannot be differentiated so.
        """
        rows = len(grads[0]) if self._rows is None else self._rows
        batched = [isinstance(one, Tensor) and one.ndim > 0 and len(one) == rows for one in self.inputs]
        for one, version in zip(self.inputs, self._versions, strict=True):
            if isinstance(one, Tensor) and one._version != version:
                raise ModelError(
                    f"{name}: its input was changed in place after its forward; change a copy instead"
                )

        def inner(values: dict[str, Tensor], mapped: list[Tensor], above: list[Tensor]) -> Tensor:
            samples = iter(mapped)
            given = [
                next(samples)[None] if of_batch else one
                for of_batch, one in zip(batched, self.inputs, strict=True)
            ]
            args, kwargs = tree_unflatten(given, self._given)
            with swapped(self.bare.module, values):
                outputs, _ = tree_flatten(self.bare.original(*args, **kwargs))
            floats = [out for out in outputs if isinstance(out, Tensor) and out.is_floating_point()]
            products = [(out[0] * grad).sum() for out, grad in zip(floats, above, strict=True)]
            return torch.stack(products).sum()

        values = {key: getattr(self.bare.module, key).detach() for key in self.bare.names}
        mapped = [one for of_batch, one in zip(batched, self.inputs, strict=True) if of_batch]
        try:
            each = torch.func.vmap(torch.func.grad(inner), in_dims=(None, 0, 0))
            found = each(values, mapped, list(grads))
        except Exception as error:  # noqa: BLE001  a model's own code runs in it
            raise ModelError(
                f"{name}.{self.bare.names[0]} has no per-sample gradient ({first_line(error)}); freeze it, "
                "write the module with known layers, or use engine='opacus'"
            ) from None
        return {key: Rows(value) for key, value in found.items()}


@contextmanager
def swapped(module: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Other tensors in the place of some of a module's own parameters while open."""
    own = {name: module._parameters[name] for name in values}
    try:
        for name, value in values.items():
            module._parameters[name] = value  # type: ignore[assignment]
        yield
    finally:
        module._parameters.update(own)
