"""Per-sample gradients by opacus (Yousefpour et al. 2021, arXiv:2109.12298), for layers that have no rule here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from robust.defenses.privacy.gradients.engine import Consumer, Gate
from robust.defenses.privacy.gradients.parts import Rows
from robust.errors import ModelError, first_line


class OpacusEngine:
    """opacus's GradSampleModule behind the same consumer.

    Args:
        model: wrapped, so that `module` is what must be called from now on; its parameters stay the same objects.
        batch_first: whether the batch is the first dimension of every layer, as opacus asks.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        consumer: Consumer,
        batch_first: bool = True,
    ) -> None:
        try:
            from opacus import GradSampleModule
        except ImportError as error:
            raise ModelError(
                f"engine='opacus' needs opacus ({first_line(error)}); pip install 'robust-toolkit[privacy]'"
            ) from None
        self.names, self.parameters, self.consumer = list(parameters), list(parameters.values()), consumer
        try:
            self.module: Any = GradSampleModule(
                model, batch_first=batch_first, loss_reduction="sum", strict=True
            )
        except (NotImplementedError, ValueError) as error:
            raise ModelError(f"opacus cannot take this model: {first_line(error)}") from None
        numbers = {id(parameter) for parameter in self.parameters}
        self.layers = [
            (name or type(module).__name__, module)
            for name, module in model.named_modules()
            if any(id(p) in numbers for p in module._parameters.values())
        ]
        self._queued = False
        self.rows: int | None = None
        for parameter in self.parameters:
            parameter.register_hook(self._arrived)
        gate = Gate(self)
        self.module.register_forward_pre_hook(gate.enter, prepend=True, with_kwargs=True)
        self.module.register_forward_hook(gate.leave, always_call=True)

    @property
    def recording(self) -> bool:
        """Whether opacus keeps per-sample gradients now."""
        return bool(self.module.training) and torch.is_grad_enabled()

    def pause(self) -> None:
        """Layers run as they are until `unpause`."""
        self.module.disable_hooks()

    def unpause(self) -> None:
        """Ends the `pause`."""
        self.module.enable_hooks()

    def _arrived(self, grad: Tensor) -> Tensor:
        """Once in every backward pass: the gradients are taken when it ends."""
        if not self._queued and self.module.training:
            self._queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        return grad

    def _finish(self) -> None:
        self._queued = False
        parts, rows = [], 0
        with torch.no_grad():
            for name, parameter in zip(self.names, self.parameters, strict=True):
                found = getattr(parameter, "grad_sample", None)
                if found is None:
                    raise ModelError(
                        f"opacus found no per-sample gradient of parameter {name}; freeze it, or use it"
                    )
                grads = torch.stack(found).sum(0) if isinstance(found, list) else found
                parts.append(Rows(grads))
                rows = len(grads)
                parameter.grad_sample = None  # type: ignore[attr-defined]
                parameter.grad = None
            self.consumer.consume(rows, parts)
