"""The vote: noisy copies of many samples in batches of one shape, by a model that says which it is."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from robust import footprint
from robust.classifier import Classifier
from robust.cuda_ops import vote_counts
from robust.defenses.certified.noises import Noise
from robust.errors import ModelError
from robust.twin import Twin, make_twin, worth_compiling

Precision = Literal["float32", "bfloat16", "original"]
PRECISIONS: tuple[str, ...] = get_args(Precision)
Counts = np.ndarray[Any, np.dtype[np.int64]]


class Ballot:
    """A model that votes on noisy copies; a vote is a function of (seed, stream, sample, number of the copy).

    Args:
        clf: the classifier; what votes is its twin in float32 (the same function but for rounding), its twin in
            bfloat16 (another function, for which the certificate then holds), or itself.
        x: (N, C, H, W) samples in the box, on which a twin is checked.
        sigma: the noise's standard deviation, in the unit of x.
        votes: about how many are to come, which decides whether compiling pays.
        batch: noisy copies a call; by default what the model's footprint suggests.

    Attributes:
        voter: which model votes, in words.

    Raises:
        ModelError: the model draws by itself, or has no twin in bfloat16.
    """

    def __init__(
        self,
        clf: Classifier,
        x: Tensor,
        noise: Noise,
        sigma: float,
        *,
        seed: int,
        precision: Precision,
        votes: int,
        batch: int | None,
    ) -> None:
        self.clf, self.noise, self.sigma, self.seed = clf, noise, sigma, seed
        x = x[:16].to(clf.device, torch.float32)
        clf.check(x)
        if clf.randomised:
            raise ModelError(f"{clf.name} draws by itself; smoothing draws for it: certify the model behind")
        self.classes = clf.classes
        with clf.session():
            found = footprint.measure(clf, x)
        self.batch = batch or (footprint.largest_batch(found, clf.device) if found else 32)
        self.model: Classifier | Twin = clf
        self.voter = "float32, the original"
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        twin = None if precision == "original" else make_twin(clf, x, dtype)
        if twin is None and precision == "bfloat16":
            raise ModelError(f"{clf.name} has no bfloat16 twin that could vote; certify it in float32")
        if twin is not None:
            self.model = twin
            self.voter = f"{precision}, " + ("its folded twin" if twin.folded else "its twin")
            self._compile(twin, x, found.flops * votes if found else 0.0)

    def _compile(self, twin: Twin, x: Tensor, flops: float) -> None:
        made = twin.programs.get((None, (self.batch, *x.shape[1:]), ()))
        twin.compiling = False
        if made or twin.original.device.type == "cuda" or worth_compiling(flops, gradients=False):
            example = x[torch.arange(self.batch, device=x.device) % len(x)]
            with self.clf.session():
                twin.compiling = twin.compile(None, example)
        if twin.compiling:
            self.voter += ", compiled"

    def tally(self, x: Tensor, index: Tensor, first: int, copies: int, stream: str) -> Counts:
        """Votes (B, classes) of the copies first … first + copies − 1 of each sample.

        Args:
            x: (B, C, H, W); index: (B,) their identities.
        """
        device, each = self.clf.device, min(copies, self.batch)
        rows = max(self.batch // each, 1)
        counts = torch.zeros(len(x), self.classes, dtype=torch.int64, device=device)
        with self.clf.session():
            for top in range(0, len(x), rows):
                part = x[top : top + rows].to(device, torch.float32)
                who = index[top : top + rows].to(device, torch.int64)
                for start in range(0, copies, each):
                    best = self._vote(part, who, first + start, each, stream)
                    if (
                        start + each > copies
                    ):  # the last batch has its full shape, and its excess does not vote
                        best.view(len(part), each)[:, copies - start :] = -1
                    counts[top : top + rows] = vote_counts(best, counts[top : top + rows], each)
        return counts.cpu().numpy()

    def _vote(self, x: Tensor, index: Tensor, first: int, copies: int, stream: str) -> Tensor:
        """(B · copies,) predictions; -1, nobody, where a logit is NaN. Batches are filled up to one shape."""
        at = torch.full_like(index, first)
        noisy = self.noise.add(x, self.sigma, index, at, self.seed, stream, copies)
        count = len(noisy)
        if count < self.batch:
            noisy = torch.cat([noisy, noisy[:1].expand(self.batch - count, *noisy.shape[1:])])
        top, best = self.model.logits(noisy)[:count].max(1)
        return torch.where(top == top, best, -1)
