"""Fused operations: right against float64 first, then their time beside eager PyTorch and a plain copy.

A fused operation moves every tensor once, so that its limit is the memory's bandwidth, which a copy of as many bytes
measures. On a CPU the reference is the path that runs, and is what is timed.
"""

from __future__ import annotations

import importlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from robust.cuda_ops.case import Case
from robust.cuda_ops.dispatch import VARIABLE, has_triton, interpreted
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    alternate,
    spread,
)
from robust.experiments.benchmarks.naive import naive_of

MODULES = ("robust.cuda_ops.cases_attacks", "robust.cuda_ops.cases_defences")
ODD = ((1, 1), (3, 37), (5, 1025), (33, 3072))
# (rows, elements) at which they are timed: images, and logits. A GPU's exceed its cache many times.
LARGE = {"cpu": (64, 3 * 32 * 32), "cuda": (4096, 3 * 64 * 64)}
WIDE = {"cpu": (1024, 1000), "cuda": (65_536, 1000)}
AIM = 0.02  # seconds that one timing should last
REFERENCE, EAGER, COPY = "reference", "eager", "copy"


@dataclass(frozen=True)
class Kernels(Benchmark):
    """Fused operations: errors against float64, time against eager PyTorch, share of a copy's bandwidth.

    Attributes:
        cases: the operations by name; all of `robust.cuda_ops` if empty.
        odd: (rows, elements) at which they are checked; large: at which they are timed, the device's usual if None.
        aim: seconds that one timing should last.
    """

    name: ClassVar[str] = "kernels"
    samples: ClassVar[int] = 0
    cases: Mapping[str, Case] = field(default_factory=dict)
    odd: tuple[tuple[int, int], ...] = ODD
    large: tuple[int, int] | None = None
    aim: float = AIM

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        cases, skipped = (self.cases, {}) if self.cases else find_cases()
        for line in skipped.values():
            work.say(line)
        found: dict[str, Any] = {}
        for name, case in cases.items():
            runnable = backends_here(case, work.device)
            errors = check_case(case, work.device, self.odd, runnable, work.seed)
            bad = {backend: one for backend, one in errors.items() if one["error"] > one["limit"]}
            if bad:
                raise WrongResult(f"{name} is wrong: " + "; ".join(map(_complaint, bad.items())))
            large = self.large or usual(name, work.device)
            timing = time_case(case, work.device, large, runnable, work.repeats, work.seed, self.aim)
            found[name] = {"shape": list(large), "tolerance": case.tolerance, "errors": errors, **timing}
            work.say(f"{name}: {summary(found[name])}")
        return {"cases": found, "skipped": skipped}

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        heads = [
            "operation",
            "runs as",
            "error",
            "microseconds",
            "of the copy's bandwidth",
            "faster than eager",
        ]
        rows = []
        for name, one in record["cases"].items():
            for backend, fraction in one["bandwidth"].items():
                error = one["errors"].get(backend)
                ratio = one["ratios"].get(backend)
                cells = [f"{1e6 * statistics.median(one['seconds'][backend]):.3g}", f"{fraction:.0%}"]
                cells = ["" if error is None else f"{error['error']:.1e}", *cells]
                rows.append([name, backend, *cells, "" if ratio is None else spread(ratio)])
        return heads, rows


def find_cases() -> tuple[dict[str, Case], dict[str, str]]:
    """All cases of `robust.cuda_ops` by name, and a line for each of its lists that is absent."""
    cases: dict[str, Case] = {}
    skipped: dict[str, str] = {}
    for module in MODULES:
        try:
            cases |= dict(importlib.import_module(module).CASES)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            skipped[module] = f"{module} is not in this version"
    return cases, skipped


def usual(name: str, device: torch.device) -> tuple[int, int]:
    """The shape at which a case is timed on a device."""
    shapes = WIDE if name.startswith("loss") else LARGE
    return shapes.get(device.type, shapes["cpu"])


def backends_here(case: Case, device: torch.device) -> list[str]:
    """The fused implementations of a case that can run on this device."""
    here = {
        "triton": has_triton() and (device.type == "cuda" or interpreted()),
        "cuda": device.type == "cuda",
    }
    return [backend for backend in case.backends if here.get(backend, False)]


def check_case(
    case: Case,
    device: torch.device,
    shapes: Sequence[tuple[int, int]],
    backends: Sequence[str],
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """The largest error of the reference and of each backend over the shapes, and where it is.

    Returns:
        Per implementation "error", relative to the largest number of the reference in float64 (in the arguments' own
        precision where the tolerance is 0, and then 0 or infinity); "limit": the tolerance, or twice what the
        reference itself loses in the arguments' precision if that is more; and "at": the shape, where the error is
        largest in its limit.
    """
    found: dict[str, dict[str, Any]] = {}
    for rows, elements in shapes:
        arguments = dict(case.make(rows, elements, seed, device))
        exact = case.tolerance == 0
        right = leaves(case.reference(**_copied(arguments, None if exact else torch.float64)))
        limit = max(case.tolerance, 2 * _largest(case.reference(**_copied(arguments)), right, exact))
        for backend in (REFERENCE, *backends):
            with forced(backend):
                error = _largest(case.operation(**_copied(arguments)), right, exact)
            one = {"error": error, "limit": limit, "at": [rows, elements]}
            if backend not in found or _excess(one) > _excess(found[backend]):
                found[backend] = one
    return found


def _largest(made: Any, right: Sequence[Tensor], exact: bool) -> float:
    """The largest error over the tensors of a result."""
    return max((_error(*pair, exact) for pair in zip(leaves(made), right, strict=True)), default=0.0)


def _excess(one: Mapping[str, Any]) -> float:
    """An error in its limit."""
    error, limit = float(one["error"]), float(one["limit"])
    return error / limit if limit else error


def time_case(
    case: Case,
    device: torch.device,
    shape: tuple[int, int],
    backends: Sequence[str],
    repeats: int,
    seed: int = 0,
    aim: float = AIM,
) -> dict[str, Any]:
    """Times each backend, the reference, the eager composition and a copy of as many bytes in alternation.

    Returns:
        "moved" bytes; per contestant "seconds" a call of every round; per implementation "bandwidth", the fraction of
        the copy's, and "ratios" of the eager composition's time (the reference's on a GPU where there is none).
    """
    arguments = dict(case.make(*shape, seed, device))
    moved = case.moved(arguments)
    source = torch.empty(max(moved // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls: dict[str, Callable[[], Any]] = {COPY: lambda: target.copy_(source)}
    naive = naive_of(case.operation, arguments)
    if naive is not None:
        calls[EAGER] = lambda: naive(**arguments)
    for backend in (REFERENCE, *backends):
        calls[backend] = _call(case, arguments, backend)
    entries, loops = [], {}
    for name, call in calls.items():
        loops[name] = _loops(call, device, aim)
        entries.append(Contestant(name, _repeated(call, loops[name])))
    timings, _ = alternate(entries, repeats, device)
    seconds = {name: [value / loops[name] for value in timing["seconds"]] for name, timing in timings.items()}
    eager = EAGER if naive is not None else REFERENCE
    bandwidth, faster = {}, {}
    for backend in (REFERENCE, *backends):
        bandwidth[backend] = statistics.median(_pairs(seconds[COPY], seconds[backend]))
        if backend != eager:
            each = _pairs(seconds[eager], seconds[backend])
            faster[backend] = {
                "against": eager,
                "pairs": each,
                "median": statistics.median(each),
                "min": min(each),
                "max": max(each),
            }
    first = {backend: timings[backend]["first_seconds"] for backend in backends}
    return {
        "moved": moved,
        "seconds": seconds,
        "loops": loops,
        "bandwidth": bandwidth,
        "ratios": faster,
        "first_seconds": first,
        "copy_gb_per_second": moved / statistics.median(seconds[COPY]) / 1e9,
    }


def summary(found: Mapping[str, Any]) -> str:
    """A case's fractions of the copy's bandwidth in a line."""
    return ", ".join(f"{backend} {value:.0%} of a copy" for backend, value in found["bandwidth"].items())


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Has the dispatch take this implementation."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def leaves(value: Any) -> list[Tensor]:
    """The tensors of a result, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in leaves(part)]
    if isinstance(value, tuple | list):
        return [leaf for part in value for leaf in leaves(part)]
    return []


def _copied(value: Any, dtype: torch.dtype | None = None) -> Any:
    """Arguments of their own for one call, floating-point ones in `dtype`."""
    if isinstance(value, Tensor):
        copied = value.detach().clone()
        return copied.to(dtype) if dtype is not None and value.is_floating_point() else copied
    if isinstance(value, Mapping):
        return {name: _copied(part, dtype) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_copied(part, dtype) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_copied(part, dtype) for part in value)
    return value


def _error(made: Tensor, right: Tensor, exact: bool) -> float:
    """The largest difference, relative to the largest number that is right; infinite for another shape or a NaN."""
    if made.shape != right.shape:
        return float("inf")
    if exact:
        alike = torch.equal(made.isnan(), right.isnan()) and torch.equal(
            made.nan_to_num(), right.nan_to_num()
        )
        return 0.0 if alike else float("inf")
    if right.numel() == 0:
        return 0.0
    made, right = made.double(), right.double()
    same = made.eq(right) | (made.isnan() & right.isnan())
    scale = right[right.isfinite()].abs().max() if bool(right.isfinite().any()) else right.new_tensor(1.0)
    wrong = torch.where(same, 0.0, (made - right).abs()).max() / scale.clamp_min(1e-30)
    return float(wrong) if wrong == wrong else float("inf")


def _call(case: Case, arguments: dict[str, Any], backend: str) -> Callable[[], Any]:
    def call() -> Any:
        with forced(backend):
            return case.operation(**arguments)

    return call


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def _loops(call: Callable[[], Any], device: torch.device, aim: float) -> int:
    """How often a call has to be repeated for a timing to last `aim` seconds; the call is warm afterwards."""
    call()
    count, seconds = 1, 0.0
    while seconds < aim / 4 and count < 4096:
        count *= 4
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        _repeated(call, count)()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begun
    return max(1, round(count * aim / max(seconds, 1e-9))) if seconds else count


def _pairs(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]


def _complaint(item: tuple[str, dict[str, Any]]) -> str:
    backend, one = item
    return f"{backend} is off by {one['error']:.1e} at {tuple(one['at'])}"
