"""The page of an inversion run: the table, originals and recovered images, curves, doubts and conditions."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from robust.report import count, percent
from robust.report_figures import png

SHOWN = 12  # images of each attack
_WIDTH, _HEIGHT = 480, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 16, 52
_TABLE: tuple[str, ...] = (
    "attack",
    "name",
    "sees",
    "psnr",
    "ssim",
    "guess_psnr",
    "guess_ssim",
    "quartiles",
    "gain",
    "labels_right",
)
_TABLE += ("objective", "evaluations", "attack_seconds", "falling", "curve", "samples", "confidence")


def page(
    found: Mapping[str, Any],
    guess: Tensor,
    pictures: Mapping[str, Sequence[tuple[Tensor, Tensor, Mapping[str, Any]]]],
    bounds: tuple[float, float],
) -> str:
    """The page, self-contained.

    Args:
        found: as ``inversion.json`` has it. guess: (C, H, W) the image-independent guess.
        pictures: of each attack the true image, the recovered one and the sample's numbers.
        bounds: the box of all images.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, count=count, settings=settings_text)
    low, high = bounds

    def shown(image: Tensor) -> str:
        return png((image - low) / (high - low))

    galleries = [
        {
            "name": row["name"],
            "sees": row["sees"],
            "images": [
                {"true": shown(true), "recovered": shown(recovered), **numbers}
                for true, recovered, numbers in list(pictures[row["name"]])[:SHOWN]
            ],
            "curve": curve_svg(row["curve"], row["name"]),
        }
        for row in found["attacks"]
    ]
    return environment.get_template("inversion.html.j2").render(
        found=found,
        guess=shown(guess),
        pixelated=max(guess.shape[1:]) <= 96,
        observed=protocol_text(found["protocol"]),
        galleries=galleries,
        facts=_facts(found),
        stored=json.dumps(found, indent=2, ensure_ascii=False),
    )


def settings_text(row: Mapping[str, Any]) -> str:
    """An attack's settings in words."""
    return ", ".join(
        f"{key}={value}" for key, value in row.items() if key not in _TABLE and value is not None
    )


def protocol_text(protocol: Mapping[str, Any]) -> str:
    """What is observed, in words."""
    batch = protocol["batch"]
    parts = ["the gradient of one sample" if batch == 1 else f"the mean gradient of {batch} samples"]
    if protocol["steps"] > 1:
        parts.append(f"of {protocol['steps']} local steps at rate {protocol['lr']:g}")
    if protocol["clip"] is not None:
        parts.append(f"clipped to {protocol['clip']:g}")
        parts.append(
            f"with noise of {protocol['noise']:g} of the clip" if protocol["noise"] else "without noise"
        )
    if protocol["keep"] < 1:
        parts.append(f"the largest {percent(protocol['keep'])} of its entries")
    if protocol["bits"] is not None:
        parts.append(f"in {protocol['bits']} bits")
    return ", ".join(parts)


def curve_svg(curve: Mapping[str, Sequence[float]], name: str) -> str:
    """The best objective so far against steps, on a logarithmic axis; "" where there is none to draw."""
    points = [(s, v) for s, v in zip(curve["steps"], curve["objective"], strict=True) if v > 0]
    if len(points) < 2:
        return ""
    tens = [math.log10(value) for _, value in points]
    low, high = math.floor(min(tens)), math.ceil(max(tens) + 1e-9)
    last = points[-1][0]

    def place(step: float, ten: float) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last
        return across, _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - ten) / max(high - low, 1)

    parts = []
    for ten in range(low, high + 1, max(1, (high - low) // 4)):
        y = place(0, ten)[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">1e{ten}</text>')
    for step in (0, last / 2, last):
        x = place(step, low)[0]
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{step:.0f}</text>')
    line = "L".join(
        f"{x:.1f},{y:.1f}" for x, y in (place(s, t) for (s, _), t in zip(points, tens, strict=True))
    )
    parts.append(f'<path class="measured" d="M{line}"/>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">step</text>')
    title = f"Objective of {escape(name)}: {points[0][1]:.2g} at first, {points[-1][1]:.2g} at last"
    return (
        f'<svg class="curve" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{title}"><title>{title}</title>'
        f"{''.join(parts)}</svg>"
    )


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions as (name, value)."""
    device = found["device"]
    return [
        ("model", f"{found['model']['name']}, digest {found['model']['digest'][:16]}"),
        ("samples", f"{found['data']['n']:,}, digest {found['data']['digest'][:16]}"),
        ("held out", f"{found['held_out']['n']:,}, digest {found['held_out']['digest'][:16]}"),
        ("observed", protocol_text(found["protocol"])),
        ("labels", "given to the attacker" if found["known_labels"] else "found by the attack"),
        ("seconds in all", count(float(found["seconds"]))),
        ("seed", str(found["seed"])),
        ("device", f"{device['name']} ({device['type']}), {device['cores']} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("commit", found["commit"]),
        ("finished", found["finished"]),
    ]
