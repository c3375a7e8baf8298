"""How good recovered images are: PSNR and SSIM, beside the best guess that never saw the gradient."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robust.errors import DataError
from robust.similarity import matched, psnr, ssim

MOST = 120.0  # decibels, of images that are equal: beyond float32's own rounding
_CURVE = 60  # points of an objective's curve that are kept


@dataclass(frozen=True, eq=False)
class Guess:
    """An image (C, H, W) in the model's box that is guessed whatever is observed."""

    name: str
    image: Tensor


def best_guess(held_out: Tensor, bounds: tuple[float, float] = (0.0, 1.0)) -> Guess:
    """The best image-independent guess: the mean image, the median image, their mean colour or mid-grey.

    The one with the highest median PSNR on images that are not attacked.

    Args:
        held_out: (M, C, H, W) in the box.

    Raises:
        DataError: none are given, in one line.
    """
    if not len(held_out):
        raise DataError("no held-out images, from which a guess is made; give at least 1 (--held-out)")
    low, high = bounds
    mean = held_out.double().mean(0)
    found = {
        "mean image": mean,
        "median image": held_out.double().median(0).values,
        "mean colour": mean.mean((1, 2), keepdim=True).expand_as(mean),
        "mid-grey": torch.full_like(mean, (low + high) / 2),
    }
    scores = {
        name: float(psnr(image.expand_as(held_out), held_out, high - low).median())
        for name, image in found.items()
    }
    name = max(scores, key=lambda key: scores[key])
    return Guess(name, found[name].float())


def compared(
    x: Tensor, true: Tensor, guess: Guess, bounds: tuple[float, float]
) -> tuple[list[dict[str, float]], Tensor]:
    """PSNR and SSIM of each true image's recovery and of the guess, and which recovered row belongs to which image.

    Args:
        x: (N, C, H, W) recovered of one batch, in any order: they are assigned so that squared distances are smallest,
            which flatters an attack on a batch a little. true: likewise, in the order of the result.
    """
    order, width = matched(x, true), bounds[1] - bounds[0]
    told = {
        "psnr": psnr(x[order], true, width),
        "ssim": ssim(x[order], true, width),
        "guess_psnr": psnr(guess.image.expand_as(true), true, width),
        "guess_ssim": ssim(guess.image.expand_as(true), true, width),
    }
    capped = {name: values.clamp_max(MOST).tolist() for name, values in told.items()}
    return [{name: capped[name][k] for name in capped} for k in range(len(true))], order


def summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over samples, with the quartiles of PSNR, and how many decibels above the guess an attack is."""
    middle = {
        key: statistics.median(row[key] for row in samples)
        for key in ("psnr", "ssim", "guess_psnr", "guess_ssim")
    }
    values = torch.tensor([row["psnr"] for row in samples], dtype=torch.float64)
    told = [row["told"] == row["label"] for row in samples if row["told"] >= 0]
    return {
        **middle,
        "quartiles": torch.quantile(values, torch.tensor([0.25, 0.75], dtype=torch.float64)).tolist(),
        "gain": middle["psnr"] - middle["guess_psnr"],
        "labels_right": sum(told) / len(told) if told else None,
    }


def thinned(track: Tensor) -> dict[str, list[float]]:
    """A curve of the best objective so far over all restarts (restarts, steps): steps and values, NaN left out."""
    best = track.double().nan_to_num(torch.inf).amin(0).cummin(0).values
    steps = torch.linspace(0, len(best) - 1, min(_CURVE, len(best))).round().long().unique()
    kept = [int(step) for step in steps if bool(best[step].isfinite())]
    return {"steps": [float(step + 1) for step in kept], "objective": [float(best[step]) for step in kept]}


def still_falling(track: Tensor) -> float:
    """The fraction by which the best objective fell in the last tenth of the steps."""
    best = track.double().nan_to_num(torch.inf).amin(0).cummin(0).values
    before, last = float(best[int(0.9 * (len(best) - 1))]), float(best[-1])
    return 1 - last / before if 0 < before < float("inf") else 0.0
