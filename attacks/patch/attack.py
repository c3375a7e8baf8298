"""The adversarial patch (Brown et al. 2017, arXiv:1712.09665)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from robust.attacks.base import Targets
from robust.attacks.patch.likeness import likeness
from robust.attacks.patch.placement import Ranges, full_size, patch_threat, placed, shape_mask
from robust.attacks.patch.trained import TrainedPatch, weathered
from robust.attacks.trial import Trial
from robust.attacks.universal.base import (
    History,
    UniversalAttack,
    batches,
    falling,
    hasten,
    scores_of,
    uphill,
    where_allowed,
)
from robust.classifier import Classifier, misclassified
from robust.errors import DataError, RobustError, ThreatError
from robust.rng import Draws, derive, identities
from robust.targets import ranking
from robust.threat import Patch
from robust.twin import Precision

_LEVELS = 255
_CANDIDATES = 10  # classes that scouts are sent to
# Rounds of scouts: the share of their steps, and how many go on. Who leads after few steps is rarely who leads at last.
_ROUNDS = ((0.4, 4), (0.3, 2), (0.3, 1))
_PLACES = 3  # of every sample, at which scouts are compared


@dataclass(frozen=True, kw_only=True)
class AdversarialPatch(UniversalAttack):
    """Adversarial patch (Brown et al. 2017, arXiv:1712.09665): one printable patch that fools wherever it lies.

    Ascent with Adam on the expected loss over images and over rotation, scale, place, light and print noise, one draw
    per image and step. The threat `Patch(height, width)` is the patch itself, upright and on whole pixels: `run` places
    it so, at a keyed place of each sample, and its points lie within the threat. What `fit` returns also turns and
    scales it, as it was learnt; the rectangle around it is then larger by the scale and up to |cos| + |sin| of the
    angle.

    Without targets a patch ends at leading to some one class, and the class that the ascent runs into is rarely the
    best one. So scouts start towards each of the likeliest classes, and one away from the true classes; in rounds what
    fools most of the samples, at places of their own, is found and learnt on with the rest of the steps. Towards a
    class they start at the picture of one of its samples, which ends higher than noise does.

    Attributes:
        share: of the image's area that it covers at scale 1, exactly, its sides in the threat's ratio; `run` makes it
            as large as the threat. None: the threat's sides are its own.
        shape: "rectangle", or "round": the ellipse within it.
        rotation: degrees to either side, in [0, 180].
        min_scale, max_scale: factors of the patch's sides.
        brightness: light on the whole patch, drawn in ± this share of the box's width.
        noise: each pixel's deviation in print, a normal's, as a share of the box's width.
        resolution: the picture's points along each side of a pixel. One gives way to blur when the patch is turned or
            scaled; with more its edges stay sharp.
        step_size: Adam's first one, as a share of the box's width; it falls to 0 along a half cosine.
        scouting: the share of the steps that all scouts take together, in [0, 1); 0 only leads away from the true
            classes.
        start: "picture" of a sample of the class that is led to, where there is one, or keyed "noise".
        restarts: ascents after the scouts, from the next best pictures or other noise; what fools most of the samples
            is kept.
    """

    norms: ClassVar[tuple[str, ...]] = ("patch",)
    steps: int = 2500
    batch: int = 64
    share: float | None = None
    shape: Literal["rectangle", "round"] = "rectangle"
    rotation: float = 20.0
    min_scale: float = 0.8
    max_scale: float = 1.2
    brightness: float = 0.1
    noise: float = 0.02
    resolution: int = 2
    step_size: float = 0.1
    scouting: float = 0.45
    start: Literal["picture", "noise"] = "picture"
    restarts: int = 1

    @classmethod
    def sized(cls, area: float, height: int, width: int, **fields: Any) -> AdversarialPatch:
        """A square or round patch of the share `area` of images of `height` × `width` pixels.

        Its threat is the largest such patch on whole pixels.
        """
        threat = patch_threat(area, height, width, fields.get("shape", "rectangle"))
        return cls(threat=threat, **{**fields, "share": area})

    def fit(
        self,
        model: Classifier,
        x: Tensor,
        y: Tensor,
        *,
        targets: int | Targets = None,
        seed: int = 0,
        index: Tensor | None = None,
        precision: Precision = "auto",
        compiled: bool | None = None,
        progress: Callable[[float], None] | None = None,
        mask: Tensor | None = None,
    ) -> TrainedPatch:
        """See `UniversalAttack.fit`; `mask` (height, width) in [0, 1] gives the patch a shape of its own."""
        found: TrainedPatch = self.fitted(
            lambda trial: self.learn(trial, mask), model, x, y, targets=targets, seed=seed, index=index,
            precision=precision, compiled=compiled, progress=progress,
        )  # fmt: skip
        return found

    def learn(self, trial: Trial, mask: Tensor | None = None) -> TrainedPatch:
        """See `UniversalAttack.learn`."""
        self.check_steps()
        blank = self._start(trial, mask)
        hasten(trial, self.restarts * self.steps * min(self.batch, len(trial.x)))
        low, high = trial.bounds
        patch, first = self._scout(trial, blank)
        patch = self._climb(trial, patch, (first, self.steps))
        if self.restarts > 1:
            patch = self._again(trial, blank, patch, first)
        levels = ((patch.texture.cpu() - low) / (high - low) * _LEVELS).round() / _LEVELS
        return replace(patch, texture=(low + (high - low) * levels).clamp(low, high))

    def _again(self, trial: Trial, blank: TrainedPatch, found: TrainedPatch, first: int) -> TrainedPatch:
        """The best of the found patch and of those that further ascents towards its class end at."""
        best = self._fooled(trial, found), found
        for restart in range(1, self.restarts):
            start = replace(
                blank, texture=self._noise(trial, len(blank.texture), restart), towards=found.towards
            )
            start = self._likeness(
                trial, start, found.towards if found.target is None else found.target, restart
            )
            patch = self._climb(trial, start, (first, self.steps), restart)
            rate = self._fooled(trial, patch)
            if rate > best[0]:
                best = rate, patch
        return best[1]

    def _scout(self, trial: Trial, patch: TrainedPatch) -> tuple[TrainedPatch, int]:
        """The most promising start with the class that it leads to, and the steps that finding it took."""
        if trial.targets is not None or not self.scouting:
            return self._likeness(trial, patch, patch.target), 0
        rivals = torch.bincount(ranking(trial.clean, trial.y)[:, 0], minlength=trial.classes)
        likeliest = rivals.argsort(descending=True, stable=True)[:_CANDIDATES].tolist()
        left, first = [replace(patch, towards=towards) for towards in (*likeliest, None)], 0
        left = [self._likeness(trial, one, one.towards) for one in left]
        for share, kept in _ROUNDS:
            steps = int(share * self.scouting * self.steps / len(left))
            rates = []
            for k, one in enumerate(left):
                left[k] = self._climb(trial, one, (first, first + steps)) if steps else one
                rates.append(self._fooled(trial, left[k]))
                first += steps
            left = [
                left[k] for k in torch.tensor(rates).argsort(descending=True, stable=True)[:kept].tolist()
            ]
        return left[0], first

    def _likeness(
        self, trial: Trial, patch: TrainedPatch, towards: int | None, rank: int = 0
    ) -> TrainedPatch:
        return patch if self.start == "noise" or towards is None else likeness(trial, patch, towards, rank)

    def _fooled(self, trial: Trial, patch: TrainedPatch) -> float:
        """The share of the samples that are led where the patch is to lead, over some places of each."""
        rows, rates = torch.arange(len(trial.x), device=trial.x.device), []
        for place in range(_PLACES):
            seed = derive(trial.seed, "patch/scout", place)
            points = torch.cat([patch.apply(x, seed=seed, index=index) for x, index in _parts(trial)])
            scores = scores_of(trial, where_allowed(trial, rows, points))
            rates.append(float(misclassified(scores, trial.y, trial.targets).double().mean()))
        return sum(rates) / len(rates)

    def _climb(
        self, trial: Trial, patch: TrainedPatch, steps: tuple[int, int], restart: int = 0
    ) -> TrainedPatch:
        """The patch after the ascent's steps of a range, over which the step size falls, and its history with them."""
        low, high = trial.bounds
        first, last = steps
        among = None if patch.towards is None else (trial.y != patch.towards).nonzero()[:, 0]
        if among is not None and not len(among):
            return patch
        history = History(self.steps)
        texture = patch.texture.to(trial.x).clone().requires_grad_(True)
        adam = torch.optim.Adam([texture])
        # Every restart takes draws of its own.
        span = restart + first / self.steps, restart + last / self.steps
        work = (span[0] / self.restarts, span[1] / self.restarts)
        for step, rows in batches(trial, self.batch, last - first, among, work):
            adam.param_groups[0]["lr"] = self.step_size * (high - low) * falling(step, last - first)
            at = restart * self.steps + first + step
            texture.grad = -self._gradient(trial, patch, texture, at, rows, history)
            adam.step()
            with torch.no_grad():
                texture.clamp_(low, high)
        return replace(patch, texture=texture.detach(), history=patch.history + history.entries)

    def _gradient(
        self, trial: Trial, patch: TrainedPatch, texture: Tensor, step: int, rows: Tensor, history: History
    ) -> Tensor:
        """The mean loss's gradient in the texture, over one placement of each of some samples."""
        draws = Draws(trial.seed, "patch/learn", identities(trial.index[rows.cpu()]), step)
        where = patch.ranges.draw(draws, patch.image, patch.size)
        with torch.enable_grad():
            worn = weathered(texture, draws, self.brightness, self.noise, trial.bounds)
            points = where_allowed(trial, rows, placed(trial.x[rows], worn, patch.mask, where, patch.size))
            # The box is left by rounding only; cutting that off inside the graph would stop every saturated texel.
            answer, hit = uphill(trial, self.loss, rows, points.detach().clamp(*trial.bounds), patch.towards)
            assert answer.gradient is not None
            assert answer.loss is not None
            (gradient,) = torch.autograd.grad((points * answer.gradient).sum() / len(rows), texture)
        history.add(step, answer.loss, hit)
        return gradient

    def _start(self, trial: Trial, mask: Tensor | None) -> TrainedPatch:
        """A patch of keyed noise, and everything else that it is to be."""
        ranges = Ranges(self.rotation, self.min_scale, self.max_scale)
        if self.start not in ("picture", "noise"):
            raise RobustError(f"start={self.start!r} is unknown; use 'picture' or 'noise'")
        if min(self.brightness, self.noise) < 0 or not self.step_size > 0 or self.resolution < 1:
            raise RobustError(
                f"brightness={self.brightness}, noise={self.noise}, step_size={self.step_size}, "
                f"resolution={self.resolution}: none negative, a positive step, at least 1"
            )
        if not 0 <= self.scouting < 1:
            raise RobustError(f"scouting={self.scouting:g}: the scouts take a share of the steps in [0, 1)")
        if self.restarts < 1:
            raise RobustError(f"restarts={self.restarts}: at least 1")
        assert isinstance(self.threat, Patch)
        if trial.x.dim() != 4:
            raise DataError(f"patch needs images (N, C, H, W); x is {tuple(trial.x.shape)}")
        channels, height, width = trial.x.shape[1:]
        sides = self.threat.height, self.threat.width
        if sides[0] > height or sides[1] > width:
            raise ThreatError(f"a patch of {sides[0]} × {sides[1]} does not fit images of {height} × {width}")
        if mask is not None and (
            tuple(mask.shape) != sides or not bool(((mask >= 0) & (mask <= 1)).all()) or not bool(mask.any())
        ):
            raise DataError(f"mask is {tuple(mask.shape)}; it must be {sides}, in [0, 1] and not empty")
        classes = [] if trial.targets is None else trial.targets.unique().tolist()
        if mask is None:
            # A square's edge is straight at any resolution; a disc's is not.
            finer = 1 if self.shape == "rectangle" else self.resolution
            mask = shape_mask(self.shape, finer * sides[0], finer * sides[1])
        mask = mask.detach().cpu().float()
        return TrainedPatch(
            texture=self._noise(trial, channels),
            mask=mask,
            sides=None if self.share is None else full_size(self.share, mask, sides, (height, width)),
            image=(height, width),
            bounds=trial.bounds,
            ranges=ranges,
            brightness=self.brightness,
            noise=self.noise,
            target=classes[0] if len(classes) == 1 else None,
        )

    def _noise(self, trial: Trial, channels: int, restart: int = 0) -> Tensor:
        """A picture of keyed noise, a draw per pixel at scale 1."""
        assert isinstance(self.threat, Patch)
        low, high = trial.bounds
        draws = Draws(trial.seed, "patch/start", torch.zeros(1, dtype=torch.long), restart)
        (noise,) = draws.uniform(channels, self.threat.height, self.threat.width)
        return low + (high - low) * noise.repeat_interleave(self.resolution, 1).repeat_interleave(
            self.resolution, 2
        )


def _parts(trial: Trial) -> Iterator[tuple[Tensor, Tensor]]:
    """The trial's samples and their identities, some at a time."""
    return zip(trial.x.split(64), trial.index.split(64), strict=True)
