"""Per-sample clipping and the noisy update of DP-SGD (Abadi et al. 2016, arXiv:1607.00133), in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from robust.cuda_ops.reference.images import working
from robust.cuda_ops.reference.smoothing import Key, fill_normals


def per_sample_norm(grads: Tensor | Sequence[Tensor]) -> Tensor:
    """See `robust.cuda_ops.per_sample_norm`."""
    parts = [grads] if isinstance(grads, Tensor) else list(grads)
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    norms = [
        torch.linalg.vector_norm(part.reshape(len(part), part[:1].numel()), dim=1, dtype=wide)
        for part in parts
    ]
    found: Tensor = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return found


def clip_accumulate(grads: Tensor, norms: Tensor | None, max_norm: float) -> tuple[Tensor, Tensor]:
    """See `robust.cuda_ops.clip_accumulate`."""
    own = per_sample_norm(grads) if norms is None else norms
    rows, bad = working(grads), ~own.isfinite()
    factor = (max_norm / own).clamp_max_(1).masked_fill_(bad, 0).to(rows.dtype)
    if torch.compiler.is_compiling() or bool(bad.any()):  # 0 · NaN is NaN
        rows = rows.masked_fill(bad[:, None], 0)
    return factor @ rows, own


def noise_update(
    param: Tensor,
    summed: Tensor,
    momentum: Tensor | None,
    lr: float,
    momentum_factor: float,
    noise_std: float,
    batch_size: float,
    key: Key,
    step: int,
    identity: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """See `robust.cuda_ops.noise_update`."""
    start = working(param)
    moved = torch.empty(1, param.numel(), dtype=start.dtype, device=param.device)
    who, when = (torch.full((1,), number, device=param.device) for number in (identity, step))
    fill_normals(moved, who, when, key)
    moved = moved.view(param.shape).mul_(noise_std).add_(summed).div_(batch_size)
    if momentum is not None and momentum_factor:
        moved.add_(momentum, alpha=momentum_factor)
    updated = start.sub(moved, alpha=lr).to(param.dtype)
    return updated, moved.to(param.dtype) if momentum_factor else None
