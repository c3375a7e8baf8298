"""What a process with Triton's interpreter finds about the kernels; imported there only, since it imports triton."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from robust import cuda_ops
from robust.cuda_ops.case import Case
from robust.cuda_ops.cases_defences import CASES, KEY
from robust.cuda_ops.kernels.philox import signed, words

# Rows and elements: single numbers, odd images, more than one part of a row; many rows where rows are summed.
SHAPES = ((1, 1), (2, 3 * 13 * 11), (3, 1027))
TALL = ((34, 64), (129, 7))
CPU = torch.device("cpu")


def wide(value: Any) -> Any:
    """Floating-point tensors in float64, in containers too."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: wide(item) for name, item in value.items()}
    return type(value)(map(wide, value)) if isinstance(value, list | tuple) else value


def tensors(value: Any) -> list[Tensor]:
    """The results of an operation as a list."""
    parts = value if isinstance(value, list | tuple) else [value]
    return [part for part in parts if part is not None]


def error(case: Case, arguments: Mapping[str, Any]) -> float:
    """Largest error relative to the largest number of the float64 reference; inf where NaN and inf differ."""
    before = json.dumps([float(t.double().nansum()) for t in arguments.values() if isinstance(t, Tensor)])
    found = tensors(case.operation(**arguments))
    after = json.dumps([float(t.double().nansum()) for t in arguments.values() if isinstance(t, Tensor)])
    expected = tensors(case.reference(**wide(arguments)))
    plain = tensors(case.reference(**arguments))
    worst = 0.0 if before == after and len(found) == len(expected) else torch.inf
    for mine, theirs, same in zip(found, expected, plain, strict=True):
        if mine.shape != same.shape or mine.dtype != same.dtype:
            return torch.inf
        finite = theirs.isfinite()
        if not torch.equal(finite, mine.isfinite()) or not torch.equal(theirs.isnan(), mine.isnan()):
            return torch.inf
        if finite.any():
            size = float(theirs[finite].abs().max())
            gap = float((mine.double() - theirs)[finite].abs().max())
            worst = max(worst, gap / size if size else gap)
    return worst


@triton.jit
def _words(out, step, identity, k0, k1, COUNT: tl.constexpr):
    block = tl.arange(0, COUNT)
    w0, w1, w2, w3 = words(block, tl.load(step), tl.load(identity), k0, k1)
    tl.store(out + 4 * block, w0.to(tl.int64))
    tl.store(out + 4 * block + 1, w1.to(tl.int64))
    tl.store(out + 4 * block + 2, w2.to(tl.int64))
    tl.store(out + 4 * block + 3, w3.to(tl.int64))


def integers() -> bool:
    """Whether a kernel's words are those of `robust.cuda_ops.philox`, bit for bit."""
    out, step, identity = torch.empty(16, 4).long(), torch.tensor([2**31 + 7]), torch.tensor([-(2**40) - 3])
    _words[(1,)](out, step, identity, *signed(KEY), COUNT=16)
    mask = 0xFFFFFFFF
    counter = (torch.arange(16), step & mask, identity & mask, (identity >> 32) & mask)
    return torch.equal(out, torch.stack(cuda_ops.philox(counter, KEY), dim=1))


def half(name: str) -> float:
    """The error of an operation on float16 arguments, in units of its precision.

    Not bfloat16, to which the interpreter truncates where a GPU rounds.
    """
    narrow = {
        key: value.half() if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in CASES[name].make(2, 429, 3, CPU).items()
    }
    return error(CASES[name], narrow) * 2**11


def graph(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The operators of this project that `torch.compile` keeps in one graph."""
    kept: list[str] = []

    def keep(module: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        kept.extend(str(node.target) for node in module.graph.nodes if "robust" in str(node.target))
        return module.forward

    torch.compile(function, backend=keep, fullgraph=True)(*arguments)
    return kept


def checks() -> dict[str, str]:
    """`torch.library.opcheck` of every operator: its schema, its fake, its gradient's registration."""
    x, ops = torch.randn(2, 3, 6, 5), torch.ops.robust
    rows, places = torch.arange(2), (torch.tensor([0, 2]), torch.tensor([1, -1]))
    weights, images = torch.tensor([0.2, 0.5, 0.3]), x.clone().requires_grad_()
    codes, scale = cuda_ops.quantise(x, 4, KEY, 0)
    gradient = torch.randn(2, 3, 7, 8, requires_grad=True)
    flat = x.flatten(1)
    samples: list[tuple[Any, tuple[Any, ...]]] = [
        (ops.noise_batch, (images, 0.5, rows, rows, *KEY, 2)),
        (ops.vote_counts, (torch.randn(4, 3), torch.zeros(2, 3).long(), 2)),
        (ops.separable_blur, (images, weights, weights, False)),
        (ops.separable_blur, (images, weights, weights, True)),
        (ops.resize_pad, (images, 4, *places, 6, 5, 7, 8, 0.5)),
        (ops.resize_pad_adjoint, (gradient, 4, *places, 6, 5, 7, 8)),
        (ops.per_sample_norm, ([flat, x],)),
        (ops.clip_accumulate, (flat, flat.norm(dim=1), 1.0)),
        (ops.noise_update, (x, x, x, 0.1, 0.9, 1.0, 2.0, *KEY, 1, 2)),
        (ops.noise_update, (x, x, None, 0.1, 0.0, 1.0, 2.0, *KEY, 1, 2)),
        (ops.stacked_mean, (flat, torch.tensor([0.4, 0.6]))),
        (ops.trimmed_mean, (flat, 0)),
        (ops.quantise, (x, 8, *KEY, 1, 2)),
        (ops.quantise, (x, 4, *KEY, 1, 2)),
        (ops.dequantise, (codes, scale, 4, x.numel())),
        (ops.sparsify, (x, x, torch.tensor(0.5))),
    ]
    found: dict[str, str] = {}
    for operator, arguments in samples:
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        if any(isinstance(argument, Tensor) and argument.requires_grad for argument in arguments):
            tests += ("test_aot_dispatch_dynamic",)
        result = torch.library.opcheck(operator.default, arguments, test_utils=tests, raise_exception=False)
        wrong = {test: text for test, text in result.items() if text != "SUCCESS"}
        found[str(operator)] = found.get(str(operator), "") + (repr(wrong) if wrong else "")
    return found


def shapes(name: str) -> tuple[tuple[int, int], ...]:
    """Where a case is tried: its own odd shapes are few, since an interpreted program takes milliseconds."""
    if name.startswith(("clip", "stacked", "trimmed")):
        return SHAPES + TALL
    return SHAPES[:2] if name.endswith(("gradient", "predictions")) else SHAPES


def spoilt() -> dict[str, bool]:
    """Whether `error` sees a result with one number off by 1e-5 of the largest, and one with a NaN too many."""
    case = CASES["stacked_median"]
    arguments = case.make(3, 7, 0, CPU)

    def broken(by: float) -> Callable[..., Tensor]:
        def operation(updates: Tensor) -> Tensor:
            out = cuda_ops.stacked_median(updates)
            out[0] += by * float(out.abs().max())
            return out

        return operation

    return {
        str(by): error(Case(broken(by), case.reference, case.make, case.moved), arguments) > case.tolerance
        for by in (1e-5, torch.nan)
    }


def sparse() -> bool:
    """Whether float16 numbers, a NaN among them, are split as the reference splits them."""
    arguments = {
        k: v.half() if isinstance(v, Tensor) else v for k, v in CASES["sparsify"].make(3, 429, 3, CPU).items()
    }
    arguments["update"][0, 0] = torch.nan
    found, expected = cuda_ops.sparsify(**arguments), cuda_ops.reference.sparsify(**arguments)
    return all(bool(((a == b) | (a.isnan() & b.isnan())).all()) for a, b in zip(found, expected, strict=True))


def orders() -> dict[str, float]:
    """Gaps between the first and second gradients of the operators and of the reference, for cut-off canvases too."""
    weights, places = torch.tensor([0.2, 0.5, 0.3]), (torch.tensor([-2, 3]), torch.tensor([4, -1]))
    x = torch.randn(2, 1, 6, 7, generator=torch.Generator().manual_seed(5))
    subjects: dict[str, Callable[[Any, Tensor], Tensor]] = {
        "separable_blur": lambda ops, t: ops.separable_blur(t, weights, weights),
        "resize_up": lambda ops, t: ops.resize_pad(t, 13, *places, 9, 12, 0.3),
        "resize_down": lambda ops, t: ops.resize_pad(t, 3, *places, 5, 5, 0.3),
        "noise_batch": lambda ops, t: ops.noise_batch(t, 0.2, torch.arange(2), 0, KEY, 2),
    }

    def derivatives(function: Callable[[Tensor], Tensor]) -> Tensor:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).pow(3).sum(), leaf, create_graph=True)
        return torch.stack((first, torch.autograd.grad(first.pow(2).sum(), leaf)[0]))

    gaps = {}
    for name, subject in subjects.items():
        mine, theirs = (
            derivatives(lambda t, o=ops, s=subject: s(o, t)) for ops in (cuda_ops, cuda_ops.reference)
        )
        gaps[name] = float((mine - theirs).abs().max() / theirs.abs().max())
    return gaps


def main() -> None:
    """One JSON object about everything."""
    x, weights = torch.randn(2, 3, 6, 5), torch.tensor([0.2, 0.5, 0.3])
    errors = {
        (name, shape): error(case, case.make(*shape, sum(shape), CPU))
        for name, case in CASES.items()
        for shape in shapes(name)
    }
    narrow = ("noise_batch", "separable_blur_wide", "resize_pad", "stacked_median", "noise_update")
    report = {
        "wrong": {
            f"{name} {shape}": found
            for (name, shape), found in errors.items()
            if not found <= CASES[name].tolerance
        },
        "compared": len(errors),
        "spoilt": spoilt(),
        "integers": integers(),
        "half": {name: half(name) for name in (*narrow, "trimmed_mean", "stacked_mean", "per_sample_norm")},
        "sparse": sparse(),
        "orders": orders(),
        "graphs": {
            "noise_batch": graph(cuda_ops.noise_batch, x, 0.5, torch.arange(2), 3, KEY, 2),
            "separable_blur": graph(cuda_ops.separable_blur, x, weights, weights),
            "quantise": graph(cuda_ops.quantise, x, 8, KEY, 1),
        },
        "checks": checks(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
