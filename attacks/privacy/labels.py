"""The labels of a batch, read from the gradient of the last layer.

With cross-entropy the last bias's gradient for class c is the mean of p_c - [y = c] over the samples. Of one sample it
is negative for the label alone (Zhao et al. 2020, arXiv:2001.02610). Of a batch the counts of the labels follow from it
once the mean of p_c is known, which of a network that is not yet sure is close to the same for all inputs (Wainakh et
al. 2022, arXiv:2105.09369, with one count for each label; Yin et al. 2021, arXiv:2104.07586, assume no label twice).
"""

from __future__ import annotations

import torch
from torch import Tensor

from robust.errors import RobustError
from robust.inversion import Protocol, Watched


def infer_labels(
    model: Watched, values: Tensor, protocol: Protocol, classes: int, shape: tuple[int, ...], name: str
) -> Tensor:
    """(batch,) labels in ascending order; exact for one sample without noise.

    Args:
        values: (n,) the observed gradient. shape: (C, H, W) of a sample. name: of the attack, for the error.

    Raises:
        RobustError: no last layer can be told from the parameters, in one line.
    """
    bias, rows = last_layer(model, values, classes)
    if bias is None and rows is None:
        raise RobustError(
            f"{name}: no last linear layer of {classes} outputs is among the parameters, so that labels cannot be "
            "read from the gradient; give labels, or use dlg"
        )
    if protocol.batch == 1:
        if bias is not None:
            return bias.argmin()[None]
        assert rows is not None
        # Rows are (p_c - [y = c]) h: the label's alone points away from all others, whatever the signs of h are.
        products = rows @ rows.T
        return (products.sum(1) - products.diagonal()).argmin()[None]
    # Without a bias the rows' sums do, of features that are mostly positive, but for a scale that nobody knows.
    residual = bias if bias is not None else torch.as_tensor(rows).sum(1)
    chances = _chances(model, shape)
    # Where the scale is unknown, a class that is not in the batch tells it: its residual is p_c times the scale.
    known = bias is not None and (protocol.clip is None or protocol.batch >= classes)
    scale = 1.0 if known else float((residual / chances).max().clamp_min(1e-12))
    return counted((chances - residual / scale) * protocol.batch, protocol.batch)


def last_layer(model: Watched, values: Tensor, classes: int) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the last layer's bias (classes,) and weight (classes, features), where there are such."""
    parts = dict(zip(model.names, model.split(values), strict=True))
    last = model.names[-1]
    if parts[last].shape == (classes,):
        before = model.names[-2] if len(model.names) > 1 else ""
        fits = before and parts[before].dim() == 2 and len(parts[before]) == classes
        return parts[last], parts[before] if fits else None
    if parts[last].dim() == 2 and len(parts[last]) == classes:
        return None, parts[last]
    return None, None


def counted(wanted: Tensor, batch: int) -> Tensor:
    """(batch,) labels whose counts are the nearest to `wanted` (classes,): whole parts, then the largest rests."""
    counts = wanted.clamp_min(0).floor()
    while int(counts.sum()) > batch:
        counts[(counts - wanted).masked_fill(counts == 0, -torch.inf).argmax()] -= 1
    for _ in range(batch - int(counts.sum())):
        counts[(wanted - counts).argmax()] += 1
    return torch.repeat_interleave(torch.arange(len(wanted)), counts.long().cpu())


def _chances(model: Watched, shape: tuple[int, ...]) -> Tensor:
    """(classes,) the mean of p over grey images from dark to light, which the attacker can ask for."""
    low, high = model.clf.bounds
    levels = torch.linspace(0.1, 0.9, 9, device=model.clf.device, dtype=model.dtype) * (high - low) + low
    with torch.no_grad():
        found: Tensor = model.logits(levels.view(-1, *[1] * len(shape)).expand(-1, *shape)).softmax(1).mean(0)
    return found
