"""Randomised smoothing: votes a second against a plain eager float32 loop, as papers write it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from robust.classifier import Classifier
from robust.defenses.certified import RandomizedSmoothing
from robust.defenses.certified.ballot import Precision as Voter
from robust.experiments.benchmarks.harness import (
    Benchmark,
    Contestant,
    Work,
    WrongResult,
    alternate,
    fresh,
    ratios,
    timing_row,
)
from robust.twin import Precision

SIGMA, FIRST, VOTES, ALPHA, BATCH = 0.25, 100, 1000, 0.001, 400
LOOP = "eager float32 loop"


@dataclass(frozen=True)
class Smoothing(Benchmark):
    """Randomised smoothing, 1,100 votes a sample: ours in each arithmetic, and a plain eager float32 loop.

    The loop is the usual one: a batch of copies of one sample, torch's own noise, the model, counts in numpy. Ours must
    give the loop's classes where the loop is sure, and radii that agree within the noise of the votes.
    """

    name: ClassVar[str] = "smoothing"
    samples: ClassVar[int] = 32  # of which compiling pays on a ResNet-20
    modes: ClassVar[tuple[Precision, ...]] = ("float32", "bfloat16")

    def measure(self, work: Work) -> dict[str, Any]:
        """See `Benchmark.measure`."""
        clf, x, _ = work.load()
        x = x.to(clf.device, torch.float32)
        clf.check(x)
        modes = work.modes or self.modes
        expected = plain(fresh(clf), x, FIRST + VOTES, work.seed)
        entries = [
            Contestant(mode, ours(clf, x, cast(Voter, mode), work.seed), ours=True, check=judge(expected))
            for mode in modes
        ]
        rival = fresh(clf)
        entries.append(Contestant(LOOP, lambda: plain(rival, x, FIRST + VOTES, work.seed)))
        timings, order = alternate(entries, work.repeats, clf.device, work.say)
        votes = len(x) * (FIRST + VOTES)
        for timing in timings.values():
            timing["votes_per_second"] = votes / float(np.median(timing["seconds"]))
        return {
            "model": {"name": clf.name, "digest": clf.digest(), "n": len(x), "shape": list(x.shape[1:])},
            "smoothing": {"sigma": SIGMA, "n0": FIRST, "n": VOTES, "alpha": ALPHA, "loop_batch": BATCH},
            "contestants": timings,
            "order": order,
            "ratios": ratios(timings, dict.fromkeys(modes, LOOP)),
            "skipped": {},
        }

    def table(self, record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
        """See `Benchmark.table`."""
        heads = [
            "smoothing",
            "seconds",
            "first call",
            "faster",
            "with the first call",
            "votes a second",
            "voted",
        ]
        rows = []
        for name, one in record["contestants"].items():
            rows.append([*timing_row(record, name), f"{one['votes_per_second']:,.0f}", one.get("voter", "")])
        return heads, rows


def ours(clf: Classifier, x: Tensor, mode: Voter, seed: int) -> Callable[[], list[dict[str, Any]]]:
    """The certificate, on a copy of the model that keeps its twin from call to call."""
    certificate = RandomizedSmoothing(fresh(clf), sigma=SIGMA, precision=mode, seed=seed)
    return lambda: certificate.records(x, n0=FIRST, n=VOTES, alpha=ALPHA)


def plain(clf: Classifier, x: Tensor, votes: int, seed: int) -> np.ndarray[Any, Any]:
    """(N, classes) counts by the loop that people write: eager, contiguous, one sample after the other."""
    module = copy.deepcopy(clf.module).eval()
    mean, std = clf.mean, clf.std
    torch.manual_seed(seed)
    counts = np.zeros((len(x), clf.logits(x[:1]).shape[1]), np.int64)
    with torch.no_grad():
        for row, point in enumerate(x):
            left = votes
            while left > 0:
                size = min(BATCH, left)
                left -= size
                batch = point.repeat(size, 1, 1, 1)
                noisy = batch + torch.randn_like(batch) * SIGMA
                best = module((noisy - mean) / std).argmax(1).cpu().numpy()
                for label in best:
                    counts[row, label] += 1
    return counts


def judge(expected: np.ndarray[Any, Any]) -> Callable[[Any], dict[str, Any]]:
    """Ours must see the probabilities that the loop sees: within five standard errors of their difference."""

    def check(found: Any) -> dict[str, Any]:
        total = expected.sum(1)
        worst = 0.0
        for row, record in enumerate(found):
            label = int(expected[row].argmax())
            p, q = expected[row, label] / total[row], record["votes"].get(str(label), 0) / record["n"]
            error = (max(p * (1 - p), q * (1 - q), 0.01) * (1 / total[row] + 1 / record["n"])) ** 0.5
            worst = max(worst, abs(p - q) / error)
        if worst > 5:
            raise WrongResult(f"its votes are {worst:.1f} standard errors from a plain loop's")
        return {"voter": found[0]["voter"], "errors_apart": worst}

    return check
