"""A classifier in training: its own mode and arithmetic for the loss, a fast twin for the inner attack."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from robust.classifier import Classifier
from robust.errors import first_line
from robust.twin import Twin, compare, fingerprint

TRAINING = "training"  # the key in `Classifier.twins`
Arithmetic = Literal["float32", "bfloat16"]


class Learner(Classifier):
    """A classifier in training: a call runs in the module's own mode, and its gradients reach the weights.

    Inside `session` (attacks, measurements) it is the classifier that it will be: evaluation mode, frozen weights.

    Args:
        given: the classifier to train, or its bare module, which is trained in place.
        precision: "bfloat16": forwards for the loss under autocast, with weights and optimizer in float32.
        compiled: whether forwards and backwards, the inner attack's too, are compiled.
    """

    def __init__(
        self, given: Classifier | nn.Module, precision: Arithmetic = "float32", compiled: bool = False
    ) -> None:
        given = given if isinstance(given, Classifier) else Classifier(given)
        mean, std = given.mean.flatten().tolist(), given.std.flatten().tolist()
        super().__init__(given.module, given.bounds, mean, std, given.device, given.name)
        self.precision, self.compiled = precision, compiled
        self.work: Any = torch.compile(self.module) if compiled else self.module

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of x (B, C, H, W) in the box, with a graph to the weights outside a session."""
        if self._depth or (self.precision == "float32" and not self.compiled):
            return self._forward(x)
        self.cost.forwards += len(x)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            logits: Tensor = self.work(self.normalise(x))
        return logits.float()

    def logits(self, x: Tensor) -> Tensor:
        """Logits as the finished classifier would give them, without a graph."""
        with self.session(), torch.no_grad():
            return self._forward(x)

    def training_twin(self, x: Tensor) -> Twin | None:
        """The twin that inner attacks ask: folded, in this training's arithmetic, with the present weights.

        A model whose copy cannot be folded, or does something else in float32, goes without: its inner attacks ask the
        model itself. Whether bfloat16 is precise enough is the trainer's choice, and is not looked at again.

        Args:
            x: (N, C, H, W) points of the box, the first of which a new twin is checked on.
        """
        state = fingerprint(self.module)
        if TRAINING not in self.twins:
            self.twins[TRAINING] = (state, self._make_twin(x[:16]))
        known, twin = self.twins[TRAINING]
        if twin is not None and known != state:
            twin.refresh()
            self.twins[TRAINING] = (state, twin)
        found: Twin | None = twin
        return found

    def _make_twin(self, x: Tensor) -> Twin | None:
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        line = ""
        for channels_last in (True, False):
            try:
                agreement = compare(self, Twin(self, torch.float32, channels_last), x)
                twin = Twin(self, dtype, channels_last, moving=True)
                twin(x)
            except Exception as error:  # noqa: BLE001  a model's own code runs in the copy
                line = f"it fails: {first_line(error)}"
                continue
            if agreement.holds(torch.float32):
                twin.agreement, twin.compiling = agreement, self.compiled
                return twin
            line = f"logits differ by {agreement.logits:.1e}"
        self._warn(f"no twin speeds the inner attacks up ({line}); they ask the model itself")
        return None
