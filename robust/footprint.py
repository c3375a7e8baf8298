"""What a model costs per sample, measured by one pass: arithmetic and memory. It decides batch shapes and compiling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from robust.classifier import Classifier
from robust.cost import Cost
from robust.rng import seeded

_CACHES = (
    8  # a batch's largest activation may fill so many second-level caches: it then stays in the third level
)
_LEAST, _MOST = 8, 64
_SHARE = 0.4  # of the free memory of a GPU
_KEPT = 3  # how often an activation is held: for the backward pass, its gradient, and a copy under way


@dataclass(frozen=True)
class Footprint:
    """One sample's forward pass.

    Attributes:
        flops: floating-point operations of its products and convolutions.
        largest: bytes of its largest activation. total: bytes of all of them.
    """

    flops: float
    largest: int
    total: int


class _Activations(TorchDispatchMode):
    """Adds up what operations return."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = self.total = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and len(leaf) == 1:  # not a view of a weight
                size = leaf.numel() * leaf.element_size()
                self.largest, self.total = max(self.largest, size), self.total + size
        return found


def measure(clf: Classifier, x: Tensor) -> Footprint | None:
    """The footprint on the first sample of x, measured once per classifier; None where a pass cannot be watched."""
    from torch.utils.flop_counter import FlopCounterMode  # brings triton where there is one

    if clf.footprint is None:
        before = clf.cost + Cost()
        try:
            with _Activations() as seen, FlopCounterMode(display=False) as counter, seeded(0, clf.device):
                clf.logits(x[:1])
            clf.footprint = Footprint(float(counter.get_total_flops()), seen.largest, seen.total)
        except Exception:  # noqa: BLE001  a model's own code runs under the watch, and it may be a compiled one
            clf.footprint = False
        clf.cost.forwards = before.forwards
    return clf.footprint if isinstance(clf.footprint, Footprint) else None


def largest_batch(found: Footprint, device: torch.device) -> int:
    """The batch that runs best: its activations in the cache of a CPU, or filling a part of a GPU's free memory."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return _power(free * _SHARE / max(_KEPT * found.total, 1), 4, 1024)
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    cache = int(told.get("l2_cache_size") or 1 << 20)
    return _power(_CACHES * cache / max(found.largest, 1), _LEAST, _MOST)


def _power(value: float, low: int, high: int) -> int:
    """The largest power of two up to `value`, between `low` and `high`."""
    return min(max(1 << (max(int(value), 1).bit_length() - 1), low), high)
