"""Compiles the kernels that the cases launch for a Hopper GPU, without one: imported in a process of its own only.

The interpreter takes much that the compiler refuses. Here a driver stands in that names the target and launches
nothing; Triton's own compiler and assembler do the rest.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from robust.cuda_ops import dispatch

MODULES = ("robust.cuda_ops.cases_defences",)
SHAPES = ((3, 3 * 32 * 32), (17, 1000))  # sizes divisible by 16 and others are compiled differently
CPU = torch.device("cpu")


class Absent:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return device


def recording(compiled: dict[str, set[str]]) -> Any:
    """A launch that compiles, notes the kernel, and leaves the results as they are."""
    launch = JITFunction.run

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = launch(self, *arguments, grid=grid, warmup=True, **options)
        assert made.asm["cubin"]
        compiled.setdefault(self.fn.__name__, set()).add(made.hash)
        return made

    return run


def narrow(value: Any) -> Any:
    """Floating-point tensors in bfloat16."""
    return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def main() -> None:
    """Prints how many variants of each kernel were compiled, in float32 and bfloat16."""
    compiled: dict[str, set[str]] = {}
    driver.set_active(Absent())
    JITFunction.run = recording(compiled)
    dispatch.interpreted = lambda: True  # lets ROBUST_OPS=triton take CPU tensors
    os.environ["ROBUST_OPS"] = "triton"
    for module in MODULES:
        for name, case in import_module(module).CASES.items():
            first, second = (case.make(rows, elements, 0, CPU) for rows, elements in SHAPES)
            for arguments in (first, second, {key: narrow(value) for key, value in first.items()}):
                try:
                    case.operation(**arguments)
                except ValueError as refused:  # of results that no kernel has written
                    print(name, refused, file=sys.stderr)
    print(json.dumps({name: len(variants) for name, variants in compiled.items()}))


if __name__ == "__main__":
    main()
