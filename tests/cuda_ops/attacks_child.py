"""What a process of its own finds about the attacks' Triton kernels; imported there only, since it imports triton.

`interpret` runs them in Triton's interpreter, for which TRITON_INTERPRET=1 is set before triton is imported; `compile`
compiles every launch for a GPU that need not be there.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from robust import cuda_ops
from robust.cuda_ops import losses, steps
from robust.cuda_ops.cases_attacks import CASES, LOSSES, STEPS
from robust.cuda_ops.kernels import steps as kernels
from tests.cuda_ops.attack_inputs import CLASSES, CPU, SHAPES, inexact, odd_logits, wrong


def values() -> list[str]:
    """The losses whose values differ from the reference where logits are not finite or equal."""
    logits, y, targets, clean = odd_logits()
    found = []
    for name, case in LOSSES.items():
        aims = targets if "targeted" in name else None
        loss = name.removeprefix("loss ").removesuffix(", targeted")
        mine, gradient = case.operation(loss, logits, y, aims, clean)
        theirs, expected = case.reference(loss, logits, y, aims, clean)
        last = slice(-1, None) if "dlr" not in name else slice(0, 0)  # ties that leave the gradient open
        same = torch.allclose(mine, theirs, 1e-5, 1e-6, equal_nan=True)
        if not same or not torch.allclose(gradient[last], expected[last], 1e-5, 1e-6, equal_nan=True):
            found.append(name)
    return found


def layouts() -> bool:
    """Whether images in channels_last keep their layout, and a mixture of layouts is understood."""
    arguments = dict(CASES["step_l2"].make(3, 60, 1, CPU))
    expected = cuda_ops.step_l2(**arguments)
    points = ("at", "gradient", "x")
    images = {key: value.view(3, 3, 4, 5) if key in points else value for key, value in arguments.items()}
    last = {
        key: value.to(memory_format=torch.channels_last) for key, value in images.items() if key in points
    }
    found = cuda_ops.step_l2(**{**images, **last})
    both = cuda_ops.step_l2(**{**images, "gradient": last["gradient"]})
    return (
        found.is_contiguous(memory_format=torch.channels_last)
        and both.is_contiguous()
        and all(torch.allclose(image.flatten(1), expected, 0, 1e-6) for image in (found, both))
    )


def detached() -> bool:
    """Whether no gradient flows through a kernel."""
    arguments = dict(CASES["step_linf"].make(2, 5, 1, CPU))
    arguments["at"].requires_grad_()
    logits, y, _, _ = odd_logits()
    value, _ = cuda_ops.loss_gradient("margin", logits.requires_grad_(), y)
    return not cuda_ops.step_linf(**arguments).requires_grad and not value.requires_grad


def graph(function: Callable[..., Any], arguments: dict[str, Any]) -> list[str]:
    """The operators of this project that `torch.compile` keeps in one graph."""
    kept: list[str] = []

    def keep(module: torch.fx.GraphModule, example: Any) -> Callable[..., Any]:
        kept.extend(str(node.target) for node in module.graph.nodes if "robust" in str(node.target))
        return module.forward

    found = torch.compile(function, backend=keep, fullgraph=True)(**arguments)
    expected = function(**arguments)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    return kept


def checks() -> dict[str, str]:
    """`torch.library.opcheck` of every operator: its schema and its fake."""
    found = {}
    for name in [*STEPS, "momentum", "loss margin", "loss kl"]:
        arguments = dict(CASES[name].make(3, 12, 1, CPU))
        operator = getattr(torch.ops.robust, name.partition(" ")[0].replace("loss", "loss_gradient")).default
        order = [argument.name for argument in operator._schema.arguments]
        result = torch.library.opcheck(
            operator, tuple(arguments.get(key) for key in order), raise_exception=False
        )
        found[name] = repr({test: text for test, text in result.items() if text != "SUCCESS"})
    return {name: text for name, text in found.items() if text != "{}"}


def empty() -> bool:
    """Whether a batch without rows passes through."""
    arguments = {
        key: value[:0] if isinstance(value, Tensor) else value
        for key, value in CASES["apgd_l1"].make(2, 5, 1, CPU).items()
    }
    value, gradient = cuda_ops.loss_gradient("margin", torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    return cuda_ops.apgd_l1(**arguments).shape == (0, 5) and value.shape == (0,) and gradient.shape == (0, 3)


def interpret() -> dict[str, Any]:
    """Errors against the reference, and what `torch.compile` makes of the operators."""
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, about infinite logits
    shapes = {name: CLASSES if name in LOSSES else SHAPES for name in CASES}
    report: dict[str, Any] = {"wrong": wrong(shapes), "inexact": inexact()}
    with mock.patch.multiple(kernels, LONGEST=64, _RUN=64):
        rows = [*STEPS, "momentum"]
        report["wrong long"] = wrong(dict.fromkeys(rows, ((1, 65), (3, 129), (2, 200))))
    report |= {
        "values": values(),
        "layouts": layouts(),
        "empty": empty(),
        "detached": detached(),
        "checks": checks(),
    }
    report["graphs"] = {
        name: graph(CASES[name].operation, dict(CASES[name].make(3, 12, 1, CPU)))
        for name in ("step_linf", "apgd_l1", "loss dlr")
    }
    return report


def launches() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The arguments of every kernel that the cases would launch, with masks and for rows of both kinds."""
    caught = []

    def catch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        caught.append((kernel, arguments, keywords))

    def said(*_: Any) -> str:
        return "triton"

    with (
        mock.patch.object(triton.runtime.jit.JITFunction, "run", catch),
        mock.patch.object(steps, "backend", said),
        mock.patch.object(losses, "backend", said),
    ):
        for name, case in CASES.items():
            for elements in (3072, 20000) if name not in LOSSES else (10,):
                arguments = dict(case.make(2, elements, 1, CPU))
                case.operation(**arguments)
                if name.startswith("step"):
                    case.operation(**arguments, mask=torch.ones(2, dtype=torch.bool))
    return caught


def compiled() -> dict[str, Any]:
    """Bytes of machine code by kernel and constants, for compute capability 9.0."""
    types = {torch.float32: "*fp32", torch.uint8: "*u8", torch.int64: "*i64"}
    sizes = {}
    for kernel, arguments, keywords in launches():
        given = dict(zip(kernel.arg_names, arguments, strict=False))
        given |= {key: value for key, value in keywords.items() if key in kernel.arg_names}
        constants = {
            parameter.name: given[parameter.name]
            for parameter in kernel.params
            if parameter.is_constexpr or given[parameter.name] is None
        }
        signature = {
            key: "constexpr"
            if key in constants
            else types[value.dtype]
            if isinstance(value, Tensor)
            else {int: "i32", float: "fp32"}[type(value)]
            for key, value in given.items()
        }
        source = ASTSource(kernel, signature, constexprs=constants)
        label = f"{kernel.__module__}.{kernel.__name__} {constants}"
        if label not in sizes:
            options = {"num_warps": keywords["num_warps"], "enable_fp_fusion": keywords["enable_fp_fusion"]}
            made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
            sizes[label] = len(made.asm["cubin"])
    return {"sizes": sizes}


if __name__ == "__main__":
    print(json.dumps({"interpret": interpret, "compile": compiled}[sys.argv[1]]()))
