"""Figures of the report: inline SVG that follows the page's colours, and images as PNG data URIs."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 16, 52
_LARGEST_SIDE = 320
_VISIBLE = 0.4  # how far from mid-grey the largest change is shown


@dataclass(frozen=True)
class Point:
    """One measured accuracy of the curve with its 95 % interval, all fractions in [0, 1]."""

    eps: float
    accuracy: float
    low: float
    high: float


def eps_text(eps: float) -> str:
    """A radius as people write it: ``8/255`` where it is one, a short decimal otherwise."""
    if math.isinf(eps):
        return "∞"
    if abs(round(eps, 3) - eps) < 1e-6:
        return f"{round(eps, 3):g}"
    levels = eps * 255
    if levels < 64 and abs(levels * 4 - round(levels * 4)) < 1e-3:
        return f"{levels:.3g}/255"
    return f"{eps:.4g}"


def curve_svg(
    points: Sequence[Point], bound: Sequence[tuple[float, float]], *, norm: str, chance: float
) -> str:
    """Accuracy against the radius: measured points with whiskers, and the bound that the found examples give.

    Args:
        points: the measured radii in ascending order, the clean accuracy (radius 0) first.
        bound: corners (distance, accuracy) of the step line, from the distances of the found examples.
        norm: the threat's norm, for the axis.
        chance: accuracy of guessing, drawn as a line.
    """
    finite = [point for point in points if math.isfinite(point.eps)]
    right = max([point.eps for point in finite] + [distance for distance, _ in bound]) * 1.08 or 1.0
    parts = [*_axes(finite, right, norm), *_chance(chance)]
    if len(bound) > 1:
        steps = f"M{_x(bound[0][0], right):.1f},{_y(bound[0][1]):.1f}" + "".join(
            f"H{_x(distance, right):.1f}V{_y(accuracy):.1f}" for distance, accuracy in bound[1:]
        )
        parts.append(f'<path class="bound" d="{steps}"/>')
    if len(finite) > 2:
        line = "L".join(f"{_x(point.eps, right):.1f},{_y(point.accuracy):.1f}" for point in finite)
        parts.append(f'<path class="measured" d="M{line}"/>')
    parts += [_mark(point, right) for point in finite]
    summary = "; ".join(f"{eps_text(p.eps)}: {p.accuracy:.1%}" for p in points)
    return (
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="curve-name">'
        f'<title id="curve-name">Accuracy against the {escape(norm)} radius. {escape(summary)}</title>'
        f"{''.join(parts)}</svg>"
    )


def _x(eps: float, right: float) -> float:
    return _LEFT + (WIDTH - _LEFT - _RIGHT) * eps / right


def _y(accuracy: float) -> float:
    return _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - accuracy)


def _axes(points: Sequence[Point], right: float, norm: str) -> list[str]:
    parts = []
    for percent in (0, 25, 50, 75, 100):
        y = _y(percent / 100)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{percent} %</text>')
    last = -math.inf
    for point in points:
        x = _x(point.eps, right)
        # A label needs about 52 units; a radius whose label would run into the last one keeps only its mark.
        if x - last >= 52:
            last = x
            label = eps_text(point.eps)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 20}" text-anchor="middle">{label}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    label = f"{escape(norm)} radius ε"
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{label}</text>')
    return parts


def _chance(chance: float) -> list[str]:
    y = _y(chance)
    return [f'<line class="chance" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>']


def _mark(point: Point, right: float) -> str:
    x, y = _x(point.eps, right), _y(point.accuracy)
    kind = "clean" if point.eps == 0 else "robust"
    text = f"{eps_text(point.eps)}: {point.accuracy:.1%} ({point.low:.1%} to {point.high:.1%})"
    return (
        f'<g class="{kind}"><title>{text}</title>'
        f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{_y(point.low):.1f}" y2="{_y(point.high):.1f}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/></g>'
    )


def bound_from_distances(correct: Tensor, distance: Tensor) -> list[tuple[float, float]]:
    """Corners (distance, accuracy left) of the upper bound on robust accuracy that the found examples prove.

    An example at distance d breaks its sample at every radius >= d, so at radius r no more than the correct samples
    without an example within r can be robust.

    Args:
        correct: (N,) bool, classified correctly without an attack.
        distance: (N,) distance of the found example, NaN where none was found.
    """
    total = max(len(correct), 1)
    found = distance[correct & torch.isfinite(distance)].double().sort().values
    left = int(correct.sum())
    corners = [(0.0, left / total)]
    for value, count in zip(*torch.unique_consecutive(found, return_counts=True), strict=True):
        left -= int(count)
        corners.append((float(value), left / total))
    return _thinned(corners)


def _thinned(corners: list[tuple[float, float]], most: int = 200) -> list[tuple[float, float]]:
    """At most about `most` corners; a dropped corner only makes the bound looser (higher), never wrong."""
    if len(corners) <= most:
        return corners
    stride = math.ceil(len(corners) / most)
    kept = corners[::stride]
    return kept if kept[-1] == corners[-1] else [*kept, corners[-1]]


def png(image: Tensor, largest: int = _LARGEST_SIDE) -> str:
    """A (C, H, W) image in [0, 1] as a PNG data URI, of at most `largest` pixels a side.

    One, three or four channels (with opacity) are as they are, others their mean.
    """
    from PIL import Image

    channels = image.detach().cpu().float()
    if channels.shape[0] not in (1, 3, 4):
        channels = channels.mean(0, keepdim=True)
    levels = (channels.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    picture = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
    picture.thumbnail((largest, largest))
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def magnified(clean: Tensor, adversarial: Tensor, width: float) -> tuple[Tensor, int]:
    """The perturbation around mid-grey, and the whole factor by which it was enlarged to be visible.

    Args:
        clean: (C, H, W) in the model's box.
        adversarial: the same shape.
        width: the width of the box, so that the factor counts in displayed levels.
    """
    change = (adversarial.double() - clean.double()) / width
    largest = float(change.abs().max())
    factor = max(1, math.floor(_VISIBLE / largest)) if largest > 0 else 1
    if factor > 20:
        scale = 10 ** (len(str(factor)) - 2)
        factor = factor // scale * scale
    return 0.5 + change * factor, factor
