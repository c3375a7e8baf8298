"""Model inversion: what a class looks like, from the confidences of a model that knows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.privacy.inversion import STARTS, InversionAttack, require
from robust.attacks.privacy.inverting import total_variation
from robust.classifier import Classifier
from robust.errors import ConfigError
from robust.inversion import Recovery
from robust.rng import Draws


@dataclass(frozen=True, kw_only=True)
class ModelInversion(InversionAttack):
    """Model inversion (Fredrikson et al. 2015, DOI 10.1145/2810103.2813677): the class's most confident image.

    Descends -log p_c(x), which is least where the paper's cost 1 - p_c is (Algorithm 1, MI-Face) and has a slope also
    where the model is sure of another class; a total variation and the squared distance to a prior are the auxiliary
    term. By Adam inside the box; the point of the least cost counts.

    Attributes:
        steps: at most. step_size: of Adam, in widths of the box.
        tv: weight of the total variation of [0, 1] images, a mean over neighbours.
        pull: weight of the mean squared distance to the prior.
        goal: a class is done when 1 - p_c is at most this (the paper's γ).
        start: "prior" (mid-grey where there is none), "grey" or "noise" (uniform).
    """

    sees: ClassVar[Literal["gradient", "confidences"]] = "confidences"
    steps: int = 500
    step_size: float = 0.02
    tv: float = 1.0
    pull: float = 10.0
    goal: float = 0.0
    start: Literal["noise", "grey", "prior"] = "prior"

    def __post_init__(self) -> None:
        require(
            self.name,
            self.steps >= 1 and self.step_size > 0 and min(self.tv, self.pull, self.goal) >= 0,
            f"steps={self.steps}, step_size={self.step_size}, tv={self.tv}, pull={self.pull}, goal={self.goal}: at "
            "least 1, positive, and not negative",
        )
        require(self.name, self.start in STARTS, f"start={self.start!r} is none of {', '.join(STARTS)}")

    def __call__(
        self,
        clf: Classifier,
        classes: Tensor,
        *,
        shape: tuple[int, ...],
        prior: Tensor | None = None,
        seed: int = 0,
        index: int = 0,
    ) -> Recovery:
        """One image for each of the classes (K,), as the model's own gradient leads to it.

        Args:
            clf: the model. shape: (C, H, W) of an input.
            prior: (C, H, W) in the box, what an input looks like in general.
            seed: with the class and `index` the key of a noisy start.

        Raises:
            ConfigError: a class that the model has not, in one line.
        """
        low, high = clf.bounds
        u, anchor = self._start(clf, classes, shape, prior, seed, index)
        first, second = torch.zeros_like(u), torch.zeros_like(u)
        best, least = u.clone(), torch.full((len(u),), torch.inf).to(u)
        track = torch.full((len(u), self.steps), torch.nan)
        goal = classes.to(u.device).long()
        done = torch.zeros(len(u), dtype=torch.bool, device=u.device)
        taken = 0
        for step in range(self.steps):
            u.requires_grad_()
            logs = clf(u * (high - low) + low).log_softmax(1)
            if step == 0 and int(goal.max()) >= logs.shape[1]:
                raise ConfigError(f"{self.name}: class {int(goal.max())}, and {clf.name} has {logs.shape[1]}")
            doubt = -logs.gather(1, goal[:, None])[:, 0]
            extra = torch.stack([total_variation(image) for image in u]) * self.tv
            cost = doubt + extra + self.pull * (u - anchor).square().flatten(1).mean(1)
            (slope,) = torch.autograd.grad(cost.sum(), u)
            u, value, taken = u.detach(), cost.detach(), taken + len(u)
            better = (value < least) & ~done
            least, best[better] = torch.where(better, value, least), u[better]
            track[:, step] = least.cpu()
            done |= -torch.expm1(-doubt.detach()) <= self.goal
            if bool(done.all()):
                break
            first.lerp_(slope, 0.1)
            second.lerp_(slope**2, 0.001)
            unbiased = (second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            u = (u - self.step_size * first / (1 - 0.9 ** (step + 1)) / unbiased).clamp(0, 1)
        clf.cost.backwards += taken
        x = (best * (high - low) + low).cpu()
        return Recovery(x, classes.cpu().long(), float(least.mean()), track, taken, bool(done.all()))

    def _start(
        self,
        clf: Classifier,
        classes: Tensor,
        shape: tuple[int, ...],
        prior: Tensor | None,
        seed: int,
        index: int,
    ) -> tuple[Tensor, Tensor]:
        """The first points (K, C, H, W) and the prior (C, H, W), both in [0, 1]."""
        if classes.dim() != 1 or not len(classes) or classes.is_floating_point() or int(classes.min()) < 0:
            raise ConfigError(
                f"{self.name}: classes {tuple(classes.shape)} of {classes.dtype}; give integers (K,)"
            )
        low, high = clf.bounds
        grey = torch.full(shape, 0.5)
        anchor = grey if prior is None else ((prior.cpu() - low) / (high - low)).float()
        if self.start == "noise":
            u = Draws(seed, f"inversion/class-{index}", classes.cpu().long()).uniform(*shape)
        else:
            u = (anchor if self.start == "prior" else grey).expand(len(classes), *shape).clone()
        return u.to(clf.device), anchor.to(clf.device)
