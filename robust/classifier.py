"""The white-box face of a model: logits from points in a box, with normalisation, counts and self-diagnosis inside."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from robust.cost import Cost
from robust.errors import DataError, ModelError, first_line
from robust.precision import exact_float32
from robust.rng import seeded

_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
FLOAT_NOISE = 2e-5  # of the largest |logit|: what batch shape and hardware may change


class RobustWarning(UserWarning):
    """A doubt about a model or a result, in one line that says what is probably wrong."""


class Classifier:
    """Any module that returns logits (N, classes), seen as a function of x in `bounds`.

    The module is left as it was found: mode, gradients and buffers are restored after every use.

    Args:
        module: an `nn.Module` from normalised inputs to logits.
        bounds: the box that x lives in.
        mean, std: normalisation applied inside, a number or one per channel, in the unit of x.
        device: where to run; the module's own device if None.
        name: what reports call it.
    """

    def __init__(
        self,
        module: nn.Module,
        bounds: tuple[float, float] = (0.0, 1.0),
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        device: str | torch.device | None = None,
        name: str | None = None,
    ) -> None:
        if not bounds[0] < bounds[1]:
            raise ModelError(f"bounds={bounds} is no box; the lower bound must be below the upper one")
        parameter = next(iter([*module.parameters(), *module.buffers()]), torch.zeros(0))
        self.device = torch.device(device) if device is not None else parameter.device
        self.module = module.to(self.device)
        self.bounds = (float(bounds[0]), float(bounds[1]))
        self.name = name or type(module).__name__
        self.mean, self.std = self._statistics(mean, 0.0), self._statistics(std, 1.0)
        if not bool((self.std > 0).all() & self.mean.isfinite().all() & self.std.isfinite().all()):
            raise ModelError(f"mean={mean} must be finite, and std={std} finite and positive")
        self._dtype = parameter.dtype if parameter.is_floating_point() else torch.float32
        self._classes: int | None = None
        self._depth = 0
        self._checked = False
        self.cost = Cost()
        self.randomised = False
        self.warnings: list[str] = []
        self.twins: dict[str, Any] = {}  # what robust.twin keeps between runs
        self.footprint: Any = None  # likewise robust.footprint

    def _statistics(self, values: float | Sequence[float] | None, default: float) -> Tensor:
        numbers = torch.as_tensor(default if values is None else values, dtype=torch.float32).reshape(
            1, -1, 1, 1
        )
        return numbers.to(self.device)

    def __repr__(self) -> str:
        return f"Classifier({self.name}, bounds={self.bounds}, device={self.device})"

    @property
    def classes(self) -> int:
        """Number of classes, known after the first forward."""
        if self._classes is None:
            raise ModelError(
                "the number of classes is known after the first forward; call the classifier once"
            )
        return self._classes

    @property
    def known_classes(self) -> int | None:
        """`classes`, or None before the first forward."""
        return self._classes

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, classes) in float32 of x (N, C, H, W) in the box; gradients flow to x."""
        with self.session():
            return self._forward(x)

    def training_logits(self, x: Tensor) -> Tensor:
        """Logits in the module's current mode, with gradients for its parameters: for training loops."""
        return self._forward(x)

    def training_twin(self, x: Tensor) -> Any:
        """The `robust.twin.Twin` that a training keeps for its inner attacks; None for a model not in training."""
        return None

    def normalise(self, x: Tensor) -> Tensor:
        """(x − mean) / std per channel, in the module's dtype and on its device."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values.numel() not in (1, x.shape[1]):
                raise ModelError(
                    f"{name} has {values.numel()} values for {x.shape[1]} channels; give one each, or one"
                )
        shape = (1, -1, *[1] * (x.dim() - 2))
        z = (x.to(self.device) - self.mean.view(shape)) / self.std.view(shape)
        return z.to(self._dtype)

    def _forward(self, x: Tensor) -> Tensor:
        self.cost.forwards += len(x)
        logits = self.module(self.normalise(x))
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            shape_found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ModelError(
                f"{self.name} returned {shape_found}; a classifier returns logits ({len(x)}, classes)"
            )
        self._classes = logits.shape[1]
        return logits.float()

    def logits(self, x: Tensor) -> Tensor:
        """Logits without a graph."""
        with torch.no_grad():
            return self(x)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Evaluation mode, frozen parameters and exact float32 while open; everything restored at the end."""
        if self._depth:
            yield
            return
        modes = [(module, module.training) for module in self.module.modules()]
        flags = [(parameter, parameter.requires_grad) for parameter in self.module.parameters()]
        buffers = [
            (module, name, buffer, buffer.clone())
            for module, _ in modes
            for name, buffer in module.named_buffers(recurse=False)
        ]
        self._depth = 1
        try:
            if any(training for _, training in modes):
                self.module.eval()
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            with exact_float32():
                yield
        finally:
            self._depth = 0
            for module, training in modes:
                module.training = training
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            _restore(buffers)

    def check(self, x: Tensor) -> list[str]:
        """Diagnoses the model on its first points; warns once per finding and returns all of them.

        Raises:
            ModelError: the model fails on x or returns no finite number at all.
            DataError: x lies outside the box.
        """
        self.require_box(x)
        if self._checked or len(x) == 0:
            return self.warnings
        probe = x[:16].to(self.device)
        if self.module.training:
            self._warn(
                "the model was in train mode; it was evaluated in eval mode (call model.eval() yourself)"
            )
        try:
            with seeded(0, self.device):
                first, second = self.logits(probe), self.logits(probe)
        except _FAILURES as error:
            shape = tuple(probe.shape)
            raise ModelError(f"{self.name} fails on inputs of shape {shape}: {first_line(error)}") from error
        if self.classes < 2:
            raise ModelError(f"{self.name} returns {self.classes} logit; a classifier returns one per class")
        self._diagnose(first, second)
        self._checked = True
        return self.warnings

    def _diagnose(self, first: Tensor, second: Tensor) -> None:
        finite = first.isfinite().all(1)
        if not bool(finite.any()):
            raise ModelError(
                f"{self.name} returns NaN or infinite logits on every input; nothing can be measured"
            )
        if not bool(finite.all()):
            self._warn(
                "the model returns NaN or infinite logits on clean inputs; those samples count as misclassified"
            )
        first, second = first[finite], second[finite]
        noise = 10 * FLOAT_NOISE * max(1.0, float(first.abs().max()))
        alike = torch.allclose(first, second, rtol=0, atol=noise, equal_nan=True)
        if not alike and not self.randomised:  # a defence has declared it
            self.randomised = True
            self._warn(
                "the model is randomised (two forwards differ); outcomes are a majority over keyed draws"
            )
        if bool((first >= 0).all()) and torch.allclose(
            first.sum(1), torch.ones(len(first)).to(first), atol=1e-3
        ):
            self._warn(
                "outputs sum to 1: the model seems to return probabilities; return logits (remove the softmax)"
            )

    def require_box(self, x: Tensor) -> None:
        """Raises `DataError` unless x is finite and inside the box."""
        require_box(x, self.bounds)

    def _warn(self, text: str) -> None:
        if text in self.warnings:
            return
        self.warnings.append(text)
        warnings.warn(text, RobustWarning, stacklevel=3)

    def digest(self) -> str:
        """sha256 (hex) of the weights, buffers, normalisation and box: the model's identity in a manifest."""
        hasher = hashlib.sha256(repr((type(self.module).__qualname__, self.bounds)).encode())
        named = {**self.module.state_dict(), "#mean": self.mean, "#std": self.std}
        for name in sorted(named):
            value = named[name]
            if not isinstance(value, Tensor):
                hasher.update(repr((name, value)).encode())
                continue
            flat = value.detach().cpu().contiguous()
            hasher.update(repr((name, str(flat.dtype), tuple(flat.shape))).encode())
            hasher.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        return hasher.hexdigest()


def _restore(buffers: list[tuple[nn.Module, str, Tensor, Tensor]]) -> None:
    """Puts back buffers (owner, name, tensor, value), whether a forward wrote into them or replaced them."""
    with torch.no_grad():
        for module, name, buffer, before in buffers:
            if getattr(module, name, None) is not buffer:
                setattr(module, name, buffer)
            if not torch.equal(buffer, before):
                buffer.copy_(before)


def require_box(x: Tensor, bounds: tuple[float, float]) -> None:
    """Raises `DataError` unless x is finite and inside the box `bounds`."""
    if x.numel() == 0:
        return
    low, high = float(x.min()), float(x.max())
    if low >= bounds[0] and high <= bounds[1]:
        return
    advice = "is it normalised already? then pass mean and std"
    if high > 2:
        advice = "divide by 255 or set bounds=(0, 255)"
    if low != low or high != high:
        advice = "remove the NaN"
    raise DataError(f"inputs span [{low:.4g}, {high:.4g}], outside the box {list(bounds)}; {advice}")


def misclassified(logits: Tensor, y: Tensor, targets: Tensor | None = None) -> Tensor:
    """(N,) bool: the prediction is not `y`, or is the target. A row with NaN or infinity predicts nothing right."""
    finite = logits.isfinite().all(1)
    prediction = logits.argmax(1)
    return ~finite | (prediction != y) if targets is None else finite & (prediction == targets)


def clear(logits: Tensor, y: Tensor, targets: Tensor | None = None, noise: float = FLOAT_NOISE) -> Tensor:
    """(N,) bool: whether the outcome is outside `noise` of the largest |logit|: another machine sees the same."""
    finite = logits.isfinite().all(1)
    values = logits.nan_to_num(0.0, 1e30, -1e30)
    reached = y if targets is None else targets
    own = values.gather(1, reached[:, None])[:, 0]
    other = values.scatter(1, reached[:, None], -torch.inf).amax(1)
    return ~finite | ((other - own).abs() > noise * values.abs().amax(1).clamp_min(1e-3))
