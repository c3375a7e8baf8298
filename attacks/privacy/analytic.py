"""What a fully connected first layer gives away without any search: its input is a quotient of its gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robust.attacks.privacy.inversion import GradientInversion, Problem, require
from robust.attacks.privacy.labels import infer_labels
from robust.errors import RobustError
from robust.inversion import Recovery, Watched

_FAINT = 1e-7  # of the largest bias gradient: units below it tell nothing but rounding


@dataclass(frozen=True, kw_only=True)
class AnalyticFC(GradientInversion):
    """Analytic recovery from a first linear layer with bias (Phong et al. 2018, DOI 10.1109/TIFS.2017.2787987).

    A unit's gradients are dW_i = Σ δ_i x and db_i = Σ δ_i over samples. Of one sample x = dW_i / db_i for every unit;
    all units together give Σ db_i dW_i / Σ db_i², which is that quotient with the least influence of noise. Clipping
    and local steps cancel out. Of a batch each unit gives a mixture, and the sample itself where it alone activates the
    unit (Geiping et al. 2020, arXiv:2003.14053, Prop. 3.1; Boenisch et al. 2023, arXiv:2112.02918): quotients on which
    several units agree come first, then those that lie in the box.

    Attributes:
        alike: root mean squared difference, in widths of the box, below which two quotients are one sample.
    """

    alike: float = 1e-3

    def __post_init__(self) -> None:
        require(self.name, self.alike > 0, f"alike={self.alike}: a positive difference is wanted")

    def infers(self) -> bool:
        """See `GradientInversion.infers`."""
        return False

    def recover(self, problem: Problem) -> Recovery:
        """See `GradientInversion.recover`."""
        layer = first_layer(problem.model, problem.shape, self.name)
        parts = dict(zip(problem.model.names, problem.model.split(problem.values), strict=True))
        weight, bias = (
            parts[f"{layer}.weight" if layer else "weight"],
            parts[f"{layer}.bias" if layer else "bias"],
        )
        told = bias.abs() > _FAINT * bias.abs().max()
        if not bool(told.any()):
            raise RobustError(
                f"{self.name}: the first layer's bias has no gradient, so that no quotient can be taken"
            )
        if problem.protocol.batch == 1:
            z = ((bias[:, None] * weight).sum(0) / bias.square().sum())[None]
        else:
            z = weight[told] / bias[told, None]
        u = self._unboxed(problem, z.view(-1, *problem.shape))
        if problem.protocol.batch > 1:
            u = self._chosen(u, problem.protocol.batch)
        track = torch.zeros(1, 1)
        return Recovery(u, self._labels(problem), 0.0, track, 0, True)

    def _unboxed(self, problem: Problem, z: Tensor) -> Tensor:
        """Normalised inputs as points of [0, 1]."""
        clf, (low, high) = problem.model.clf, problem.model.clf.bounds
        view = (1, -1, *[1] * (z.dim() - 2))
        return (z * clf.std.to(z).view(view) + clf.mean.to(z).view(view) - low) / (high - low)

    def _chosen(self, u: Tensor, batch: int) -> Tensor:
        """(batch, C, H, W) of the quotients (M, C, H, W): agreed on, then in the box, each sample once."""
        flat = u.flatten(1)
        apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / flat.shape[1] ** 0.5
        agreed = (apart < self.alike).sum(1)
        outside = (flat - flat.clamp(0, 1)).abs().mean(1)
        order = sorted(range(len(flat)), key=lambda row: (-int(agreed[row]), float(outside[row])))
        kept: list[int] = []
        for row in order:
            if len(kept) < batch and all(float(apart[row, other]) >= self.alike for other in kept):
                kept.append(row)
        kept += [order[0]] * (batch - len(kept))  # fewer quotients than samples
        return u[kept]

    def _labels(self, problem: Problem) -> Tensor:
        if problem.labels is not None:
            return problem.labels
        known = (problem.model, problem.values, problem.protocol, problem.classes, problem.shape, self.name)
        try:
            return infer_labels(*known)
        except RobustError:  # images it recovers all the same
            return torch.full((problem.protocol.batch,), -1)


def first_layer(model: Watched, shape: tuple[int, ...], name: str) -> str:
    """The name of the module that gets the input first, a linear layer with bias on the flattened sample.

    Raises:
        RobustError: the first layer is another, in one line.
    """
    module, calls = model.clf.module, list[tuple[str, nn.Module, Tensor]]()
    own = {part: key for key, part in module.named_modules() if list(part.parameters(recurse=False))}
    hooks = [
        part.register_forward_pre_hook(lambda at, given: calls.append((own[at], at, given[0])))
        for part in own
    ]
    low, high = model.clf.bounds
    ramp = torch.linspace(low, high, torch.Size(shape).numel(), device=model.clf.device, dtype=model.dtype)
    try:
        with torch.no_grad():
            model.logits(ramp.view(1, *shape))
    finally:
        for hook in hooks:
            hook.remove()
    key, layer, given = calls[0]
    view = (1, -1, *[1] * (len(shape) - 1))
    z = (ramp.view(1, *shape) - model.clf.mean.to(ramp).view(view)) / model.clf.std.to(ramp).view(view)
    fits = isinstance(layer, nn.Linear) and layer.bias is not None and torch.equal(given, z.flatten(1))
    if not fits:
        raise RobustError(
            f"{name} needs a model whose first layer is linear, with a bias, on the flattened sample; "
            f"{model.clf.name} begins with {type(layer).__name__}"
        )
    return key
