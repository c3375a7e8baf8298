"""Several processes that train one model: a batch's rows are shared out, gradients added up (`torchrun`).

Every process holds the same weights, draws the same keys and takes the same steps; the first one writes. Batch
normalisation normalises each process's share by itself, as data-parallel trainings do, and its running statistics
are averaged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from robust.errors import RunError, first_line


@dataclass(frozen=True)
class Group:
    """The processes of one training.

    Attributes:
        rank: this process's number, 0 for the one that writes; size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def share(self, rows: Tensor) -> Tensor:
        """This process's part of a batch's rows (B,); parts differ by one at most.

        Batch normalisation needs two samples: of a batch that gives some process less, the last processes have none.
        """
        sharers = min(self.size, max(len(rows) // 2, 1))
        return rows[self.rank :: sharers] if self.rank < sharers else rows[:0]

    def same(self, value: Any) -> Any:
        """What the first process has, in all of them."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Sums over the processes, in place."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))

    def spread(self, module: nn.Module) -> None:
        """Gives every process the first one's weights and buffers."""
        if self.size > 1:
            for value in module.state_dict().values():
                dist.broadcast(value, src=0)

    def reduce(self, module: nn.Module, number: float, weight: float) -> float:
        """Averages gradients and running statistics over the processes; the average of `number`.

        Args:
            weight: this process's part of the batch; the parts of all processes add up to 1.
        """
        if self.size == 1:
            return number
        parameters = [p for p in module.parameters() if p.requires_grad]
        for (
            parameter
        ) in parameters:  # where a process has no rows, or a layer no part in the loss, there is none
            known = parameter.grad
            parameter.grad = torch.zeros_like(parameter) if known is None else known * weight
        buffers = [b for b in module.buffers() if b.is_floating_point()]
        for buffer in buffers:
            buffer.mul_(weight)
        loss = torch.tensor([number * weight], device=parameters[0].device)
        self.add([*(p.grad for p in parameters if p.grad is not None), *buffers, loss])
        for buffer in module.buffers():  # counters: a process that had no rows has not counted
            if not buffer.is_floating_point():
                dist.broadcast(buffer, src=0)
        return float(loss)


def join_group() -> Group:
    """The group that `torchrun` started this process in, or a group of one.

    Raises:
        RunError: the processes do not find one another.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Group()
    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        try:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        except (RuntimeError, ValueError) as error:
            raise RunError(
                f"the {size} processes of this training do not meet: {first_line(error)}"
            ) from None
    return Group(dist.get_rank(), dist.get_world_size())
