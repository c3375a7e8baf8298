"""The twin: a faster copy of a model that attacks ask in its place, while the original confirms every claim.

Batch normalisation is folded, memory is channels-last, and it may run in bfloat16 or compiled. A twin is checked
against the original on real points before it is used, and given up with a warning when it disagrees or cannot be
built: a verdict never rests on it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robust.classifier import FLOAT_NOISE, Classifier, RobustWarning
from robust.cost import Cost
from robust.errors import RobustError, first_line
from robust.folding import fold, refold
from robust.losses import Loss
from robust.programs import Program
from robust.registry import unknown

Precision = Literal["auto", "float32", "bfloat16", "original"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
_PROBE = 16
# Largest difference of logits and smallest cosine of gradients: float32 twins differ by rounding,
# bfloat16 has 8 bits, of which a deep network may lose some. Ties of a pooling layer may send a gradient elsewhere.
_LIMITS = {torch.float32: (1e-4, 0.9), torch.bfloat16: (0.15, 0.7)}

_WORTH_COMPILING = 1e13  # operations: about two minutes of a core


@dataclass(frozen=True)
class Agreement:
    """How far a twin is from its original on the points it was checked on.

    Attributes:
        logits: the largest difference of a logit, relative to the largest |logit|.
        gradients: the median cosine between input gradients of the margin; 1 where the original has none.
        labels: the fraction of points that both give the same class.
    """

    logits: float
    gradients: float
    labels: float

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether the twin may stand in for its original in this arithmetic."""
        logits, gradients = _LIMITS[dtype]
        return self.logits <= logits and self.gradients >= gradients


class Twin:
    """A copy of a classifier's module that answers in its place; its passes are counted as the classifier's own.

    Attributes:
        dtype: its arithmetic. folded: layer → normalisation folded into it. channels_last: its memory format.
        agreement: set by the check against the original.
        programs: compiled graphs by loss, shape of x and names of the other arguments; None where that failed.
        compiling: whether they answer; set for each piece of work, whichever programs earlier work has left.
        moving: whether `refresh` will be called: compiled programs then read the weights anew each time.
    """

    def __init__(
        self,
        original: Classifier,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        moving: bool = False,
    ) -> None:
        self.original, self.dtype, self.moving = original, dtype, moving
        module, self.folded = _copied(original.module)
        module = module.eval().requires_grad_(False).to(dtype=dtype)
        self.channels_last = channels_last
        if channels_last:
            module = module.to(memory_format=torch.channels_last)
        self.module: nn.Module = module
        self.agreement: Agreement | None = None
        self.programs: dict[tuple[Any, ...], Program | None] = {}
        self.compiling = False

    @property
    def cost(self) -> Cost:
        """The original's counts."""
        return self.original.cost

    @property
    def noise(self) -> float:
        """Differences from the original's logits that arithmetic explains, relative to the largest |logit|."""
        return FLOAT_NOISE if self.dtype == torch.float32 else 1e-2

    def __call__(self, x: Tensor) -> Tensor:
        """Logits (N, classes) in float32 of x (N, C, H, W) in the box; gradients flow to x."""
        self.cost.forwards += len(x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        z = self.original.normalise(x).to(self.dtype)
        if self.channels_last and z.dim() == 4:
            z = z.contiguous(memory_format=torch.channels_last)
        logits: Tensor = self.module(z)
        return logits.float()

    def refresh(self) -> None:
        """Takes over the original's present weights, in place: a training calls it after every step."""
        refold(self.module, self.original.module, self.folded)

    def logits(self, x: Tensor) -> Tensor:
        """Logits without a graph."""
        program = self.programs.get((None, tuple(x.shape), ()))
        if program is None or not self.compiling:
            with torch.no_grad():
                return self(x)
        self.cost.forwards += len(x)
        return program(x=x)[0]

    def gradient(self, loss: Loss, x: Tensor, **rest: Tensor | None) -> tuple[Tensor, ...] | None:
        """Logits (B, K), loss (B,) and its input gradient by a compiled program; None where there is none."""
        given = {name: value for name, value in rest.items() if value is not None}
        program = self.programs.get((loss, tuple(x.shape), tuple(given)))
        if program is None or not self.compiling:
            return None
        self.cost.forwards += len(x)
        return program(x=x, **given)

    def compile(self, loss: Loss | None, x: Tensor, **rest: Tensor | None) -> bool:
        """Makes the program for these arguments' shapes, once; False where that fails, with a warning.

        Args:
            loss: what `gradient` will be asked for; None for `logits`.
            x: (B, C, H, W) points of the box; rest: the loss's y, targets and reference.
        """
        given = {name: value for name, value in rest.items() if value is not None}
        key = (loss, tuple(x.shape), tuple(given))
        if key not in self.programs:
            self.programs[key] = None
            try:
                self.programs[key] = Program(
                    self._forward, loss, {"x": x, **given}, self.dtype != torch.float32, self.moving
                )
            except Exception as error:  # noqa: BLE001  a compiler may fail in any way
                _warn(self.original, f"the twin could not be compiled ({first_line(error)}); it runs eager")
        return self.programs[key] is not None

    def describe(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {
            "folded": len(self.folded),
            "channels_last": self.channels_last,
            "programs": sum(program is not None for program in self.programs.values()),
            "agreement": None if self.agreement is None else asdict(self.agreement),
        }


def _copied(module: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """A copy with normalisations folded, or a plain one where tracing fails."""
    try:
        return fold(module)
    except Exception:  # noqa: BLE001  a model's own code runs while it is traced, and may raise anything
        return copy.deepcopy(module), {}


def compare(original: Classifier, twin: Twin, x: Tensor) -> Agreement:
    """The agreement of a twin with its original on points x (N, C, H, W) of the box; counts no cost."""
    before = original.cost + Cost()
    with original.session():
        ours, own = _probe(original, x)
        theirs, other = _probe(twin, x)
    original.cost.forwards = before.forwards
    scale = float(ours.abs().max().clamp_min(1e-12))
    same = (ours.argmax(1) == theirs.argmax(1)).float().mean()
    cosine = 1.0
    if own is not None:
        live = own.abs().amax(1) > 0
        if other is None or bool((other.abs().amax(1) == 0)[live].any()):
            cosine = 0.0
        elif bool(live.any()):
            first, second = (part[live] / part[live].abs().amax(1, keepdim=True) for part in (own, other))
            cosine = float(torch.cosine_similarity(first, second, dim=1).median())
    difference = float((ours - theirs).abs().max()) / scale
    return Agreement(difference if difference == difference else float("inf"), cosine, float(same))


def _probe(model: Classifier | Twin, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits, and the flat input gradients of the margin between the two largest, None where there are none."""
    x = x.detach().clone().requires_grad_(True)
    logits = model(x)
    detached = logits.detach()
    if not logits.requires_grad:
        return detached, None
    top = detached.topk(2, dim=1).indices
    margin = logits.gather(1, top[:, :1]) - logits.gather(1, top[:, 1:])
    (gradient,) = torch.autograd.grad(margin.sum(), x, allow_unused=True)
    return detached, None if gradient is None else gradient.flatten(1).float()


def make_twin(original: Classifier, x: Tensor, dtype: torch.dtype = torch.float32) -> Twin | None:
    """A checked twin for a classifier, or None with a warning.

    The last one is kept while the weights stay as they are, and checked again on x.

    Args:
        original: the classifier, already checked (`Classifier.check`); a randomised one has no twin.
        x: (N, C, H, W) points of the box, the first of which the twin is checked on.
        dtype: torch.float32 or torch.bfloat16.
    """
    if original.randomised or len(x) == 0:
        return None
    state = fingerprint(original.module)
    kept = original.twins.get(str(dtype))
    if kept is not None and kept[0] == state:
        twin: Twin | None = kept[1]
        return twin if twin is None or _checked(original, twin, x) is None else None
    reason, twin = "", None
    for channels_last in (True, False):
        try:
            candidate = Twin(original, dtype, channels_last)
            reason = _checked(original, candidate, x) or ""
        except Exception as error:  # noqa: BLE001  a model's own code runs in the copy
            reason = f"it fails: {first_line(error)}"
        if not reason:
            twin = candidate
            break
    if twin is None:
        _warn(original, f"no {str(dtype)[6:]} twin speeds this model up ({reason}); the original is used")
    original.twins[str(dtype)] = (state, twin)
    return twin


def _checked(original: Classifier, twin: Twin, x: Tensor) -> str | None:
    """Why a twin may not be used; None when it may."""
    twin.agreement = compare(original, twin, x[:_PROBE])
    if twin.agreement.holds(twin.dtype):
        return None
    found = twin.agreement
    return f"logits differ by {found.logits:.1e}, gradients' cosine is {found.gradients:.2f}"


def fingerprint(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """Changes when a parameter or buffer is replaced or written to in place."""
    return tuple((tensor.data_ptr(), tensor._version) for tensor in (*module.parameters(), *module.buffers()))


def _warn(original: Classifier, text: str) -> None:
    if text not in original.warnings:
        original.warnings.append(text)
        warnings.warn(text, RobustWarning, stacklevel=4)


@functools.cache
def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 (tensor cores, AMX, AVX-512 BF16) and so gains by it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(told.get("avx512_bf16") or told.get("amx_bf16"))


def worth_compiling(flops: float, gradients: bool = True) -> bool:
    """Whether work of so many operations on a CPU repays compiling for it, which for logits alone takes less time."""
    return flops > (_WORTH_COMPILING if gradients else _WORTH_COMPILING / 5)


def describe_twins(model: object) -> dict[str, dict[str, Any]]:
    """What the twins are that a model's attacks asked, by their arithmetic, for a manifest."""
    kept = model.twins.items() if isinstance(model, Classifier) else ()
    return {name.removeprefix("torch."): twin.describe() for name, (_, twin) in kept if twin is not None}


def check_precision(precision: str) -> None:
    """Raises one line for a precision that does not exist."""
    if precision not in PRECISIONS:
        raise RobustError(unknown("precision", precision, list(PRECISIONS)))
