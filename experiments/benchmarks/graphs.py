"""PGD beside the graph-captured bare gradient of the same twin and a plain eager loop: part 2 of `gpu`."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from robust.attacks.base import Result
from robust.attacks.whitebox.pgd import PGD
from robust.classifier import Classifier, misclassified
from robust.experiments.benchmarks.harness import Contestant, Say, WrongResult, alternate, fresh, ratios
from robust.threat import Linf
from robust.twin import Precision, Twin, make_twin

EPS = 8 / 255
DTYPES: dict[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def pgd(clf: Classifier, x: Tensor, y: Tensor, *, steps: int, repeats: int, say: Say) -> dict[str, Any]:
    """The engine against the captured bare gradient of the same twin and an eager loop, in both precisions.

    Args:
        clf: on the device; x (N, C, H, W) in its box, y (N,).
        steps: gradients a point; repeats: rounds of the alternation.
    """
    batch = min(len(x), 1024 if x.shape[-1] <= 32 else 64)
    entries = [
        Contestant("eager loop", lambda: eager_loop(clf, x, y, batch, steps), check=_strength(clf, x, y))
    ]
    pairs: dict[str, str] = {}
    modes: tuple[Precision, ...] = ("float32", "bfloat16")
    for mode in modes:
        own = fresh(clf)
        entries.append(
            Contestant(f"engine {mode}", _engine(own, x, y, mode, steps), True, _strength(clf, x, y))
        )
        pairs[f"engine {mode}"] = "eager loop"
        twin = make_twin(fresh(clf), x, DTYPES[mode])
        if twin is not None:
            bare = captured(twin, x, y, batch, steps)
            entries.append(Contestant(f"captured gradient {mode}", bare))
            pairs[f"captured gradient {mode}"] = f"engine {mode}"
    timings, order = alternate(entries, repeats, clf.device, say)
    return {
        "model": clf.name,
        "n": len(x),
        "batch": batch,
        "contestants": timings,
        "order": order,
        "ratios": ratios(timings, pairs),
        "engine_per_captured": {
            mode: _median(timings, f"engine {mode}") / _median(timings, f"captured gradient {mode}")
            for mode in modes
            if f"captured gradient {mode}" in timings
        },
    }


def eager_loop(clf: Classifier, x: Tensor, y: Tensor, batch: int, steps: int) -> Tensor:
    """PGD as a tutorial has it: (N, C, H, W) points, in the model's own precision."""
    module = clf.module
    found = []
    for some, labels in zip(x.split(batch), y.split(batch), strict=True):
        at = (some + EPS * (2 * torch.rand_like(some) - 1)).clamp(0, 1)
        for _ in range(steps):
            at.requires_grad_(True)
            loss = F.cross_entropy(module((at - clf.mean) / clf.std), labels)
            (gradient,) = torch.autograd.grad(loss, at)
            at = at.detach() + 2.5 * EPS / steps * gradient.sign()
            at = (some + (at - some).clamp(-EPS, EPS)).clamp(0, 1)
        found.append(at)
    return torch.cat(found)


def captured(twin: Twin, x: Tensor, y: Tensor, batch: int, steps: int) -> Callable[[], None]:
    """As many input gradients as PGD takes and nothing else, from a CUDA graph; eager on a CPU."""
    point, labels = x[:batch].detach().clone().requires_grad_(True), y[:batch].clone()

    def gradient() -> Tensor:
        loss = F.cross_entropy(twin(point), labels, reduction="sum")
        (made,) = torch.autograd.grad(loss, point)
        return made

    def repeat(call: Callable[[], Any]) -> None:
        for _ in range(steps * math.ceil(len(x) / batch)):
            call()

    if x.device.type != "cuda":
        return lambda: repeat(gradient)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            gradient()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradient()
    return lambda: repeat(graph.replay)


def _engine(clf: Classifier, x: Tensor, y: Tensor, mode: Precision, steps: int) -> Callable[[], Result]:
    attack = PGD(threat=Linf(EPS), steps=steps)
    return lambda: attack.run(clf, x, y, precision=mode)


def _strength(clf: Classifier, x: Tensor, y: Tensor) -> Callable[[Any], dict[str, Any]]:
    """Robust accuracy under the points found; ours must lie in the ball."""

    def check(found: Result | Tensor) -> dict[str, Any]:
        points = found.x_adv if isinstance(found, Result) else found
        outside = int((~Linf(EPS).inside(points, x, clf.bounds)).sum())
        if outside and isinstance(found, Result):
            raise WrongResult(f"{outside} of {len(x)} points of ours lie outside the ball")
        logits = torch.cat([clf.logits(part) for part in points.split(256)])
        return {"robust_accuracy": float((~misclassified(logits, y)).float().mean())}

    return check


def _median(timings: dict[str, Any], name: str) -> float:
    return float(statistics.median(timings[name]["seconds"]))
