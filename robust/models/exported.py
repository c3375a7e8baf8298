"""Exported programs (`torch.export.save`) as modules: any batch, kept in eval mode, no pickle opened."""

from __future__ import annotations

import os
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from robust.data.fetch import one_line
from robust.errors import ModelError
from robust.models.sources import Source, Wanted

FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Parts of an archive that are unpickled, or run as machine code, when it is read.
NATIVE = ("opaque_obj_", "aotinductor/")
_environment = threading.Lock()


class ExportedModule(nn.Module):
    """An exported program whose input is one batch of images, as a module that takes batches of any size.

    Where the program was exported for one batch size, or for a range of them, batches are cut to it and the last one is
    padded with copies of its last image, whose outputs are dropped.

    Args:
        program: the program; its graph is as it was exported, so `train` and `eval` change nothing.
        name: what errors call it.
    """

    def __init__(self, program: ExportedProgram, name: str) -> None:
        super().__init__()
        self.name = name
        self.least, self.most, self.image = _input(program, name)
        self.graph: nn.Module = program.module()
        self.train(False)
        for module in self.graph.modules():
            module.training = False  # an exported graph refuses eval(), and says that it is in train mode

    def train(self, mode: bool = True) -> ExportedModule:
        """Nothing to switch: the mode was fixed when the program was exported."""
        self.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, classes)."""
        if len(x.shape[1:]) != len(self.image) or any(
            wanted not in (None, size) for wanted, size in zip(self.image, x.shape[1:], strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in self.image)
            raise ModelError(f"{self.name} was exported for images ({wanted}), not {tuple(x.shape[1:])}")
        if self.least <= len(x) <= self.most:
            return self._run(x)
        return torch.cat([self._padded(part) for part in torch.split(x, self.most)])

    def _padded(self, x: Tensor) -> Tensor:
        lacking = max(self.least - len(x), 0)
        return self._run(torch.cat([x, x[-1:].expand(lacking, *x.shape[1:])]))[: len(x)]

    def _run(self, x: Tensor) -> Tensor:
        logits: Tensor = self.graph(x)
        return logits


def exported(file: str, wanted: Wanted) -> Source:
    """A program saved by `torch.export.save`; it runs as it is, so load only programs you trust."""
    path = Path(file).expanduser()
    if wanted.weights is not None:
        raise ModelError(f"exported:{file} carries its own weights; leave out weights={wanted.weights}")
    program = _load(path)
    _check_mode(program, path)
    return Source(ExportedModule(program, f"exported:{path.name}"), f"exported:{path.name}")


def _load(path: Path) -> ExportedProgram:
    if not path.is_file():
        raise ModelError(
            f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give exported:FILE.pt2"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise ModelError(f"{path} is not a program saved by torch.export.save: {one_line(error)}") from None
    native = next((part for part in parts if any(mark in part for mark in NATIVE)), None)
    if native:
        raise ModelError(
            f"{path} holds {native}, which would run when read: not opened; export the plain model"
        )
    try:
        with _tensors_only():
            return torch.export.load(path)
    except Exception as error:  # torch's reader raises whatever the damage leads to
        raise ModelError(
            f"{path} cannot be read as a program saved by torch.export.save: {one_line(error)}"
        ) from error


@contextmanager
def _tensors_only() -> Iterator[None]:
    """While open, torch unpickles tensors and plain containers only: `torch.export.load` has no such option."""
    with _environment:
        before = os.environ.get(FORCE)
        os.environ[FORCE] = "1"
        try:
            yield
        finally:
            if before is None:
                del os.environ[FORCE]
            else:
                os.environ[FORCE] = before


def _input(program: ExportedProgram, name: str) -> tuple[int, int, tuple[int | None, ...]]:
    """The smallest and the largest batch, and the image's shape with None for what is free."""
    names = program.graph_signature.user_inputs
    holders = [node for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    value = holders[0].meta.get("val") if len(holders) == 1 else None
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise ModelError(
            f"{name} takes {len(names)} inputs; a classifier takes one tensor of images (N, C, H, W)"
        )
    batch, *image = value.shape
    least, most = _range(program, batch)
    return least, most, tuple(size if isinstance(size, int) else None for size in image)


def _range(program: ExportedProgram, size: Any) -> tuple[int, int]:
    """The batch sizes the program accepts."""
    if isinstance(size, int):
        return size, size
    limits = program.range_constraints.get(size.node.expr)
    if limits is None:
        return 1, 2**31
    return max(int(limits.lower), 1), int(limits.upper) if limits.upper < 2**31 else 2**31


def _check_mode(program: ExportedProgram, path: Path) -> None:
    """Refuse a program whose batch norms use the batch: the images of an attack would change each other's outcome."""
    for node in program.graph.nodes:
        target = str(node.target)
        trained = target.startswith("aten.batch_norm.") and len(node.args) > 5 and node.args[5] is True
        if trained or "_batch_norm_with_update" in target or "_native_batch_norm_legit_functional" in target:
            raise ModelError(
                f"{path} was exported in train mode; call model.eval() before torch.export.export"
            )
