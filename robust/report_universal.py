"""The report of a universal attack or a patch: one self-contained HTML page beside what was learnt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from robust import report_figures as figures
from robust.digest import write_atomic
from robust.report import count, percent
from robust.universal import Grid

if TYPE_CHECKING:
    from robust.universal_run import UniversalRun

GALLERY = 12
_ELSEWHERE = (
    "grid",
    "history",
    "transfer",
    "control",
    "printed",
    "photos",
    "warnings",
    "command",
    "interval",
)
_WIDTH, _HEIGHT = 480, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 18, 16, 52


def write_universal_report(run: UniversalRun, path: str | Path) -> Path:
    """Write the page: what was learnt, what it does to unseen images, over scale and angle, and on other models.

    Args:
        run: a finished run; its model is asked nothing, its images are read for the gallery.
        path: where to write; the file appears whole or not at all.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, count=count, eps=figures.eps_text)
    page = environment.get_template("universal.html.j2").render(_context(run))
    target = Path(path)
    write_atomic(target, page.encode())
    return target


def _context(run: UniversalRun) -> dict[str, Any]:
    summary = run.summary
    history = summary["history"]
    return {
        "patch": run.is_patch,
        "limit": _limit(summary),
        "towards": summary.get("towards"),
        "picture": _picture(run),
        "rows": _rows(summary),
        "gallery": _gallery(run),
        "photos": _photos(run),
        "heat": run.grid,
        "over_angle": _over_angle(run.grid, summary) if run.grid else "",
        "over_scale": _over_scale(run.grid, summary) if run.grid else "",
        "learning": _learning(history) if len(history) > 1 else "",
        "facts": _facts(summary),
        "stored": json.dumps(summary, indent=2, ensure_ascii=False),
        "command": summary.get("command"),
        **{
            name: summary[name]
            for name in (
                "attack",
                "model",
                "data",
                "train",
                "n",
                "target",
                "target_name",
                "seed",
                "success_rate",
            )
        },
        **{
            name: summary[name]
            for name in ("interval", "fooled", "attempted", "clean_accuracy", "robust_accuracy")
        },
        **{name: summary[name] for name in ("warnings", "cost", "out")},
        "learnt_by": summary["learning"],
        "print": summary.get("print"),
    }


def _limit(summary: Mapping[str, Any]) -> str:
    """How large the change may be, in words."""
    threat = summary["threat"]
    if "area" in summary:
        height, width = summary["shape"]
        return f"{height:.4g} × {width:.4g} pixels, {percent(summary['area'])} of the image"
    return f"{threat['norm']} radius {figures.eps_text(threat['eps'])}"


def _picture(run: UniversalRun) -> dict[str, Any]:
    """What was learnt, as a picture: a patch on transparent ground, a perturbation around mid-grey."""
    low, high = run.model.bounds
    if run.is_patch:
        texture = (run.change.texture - low) / (high - low)
        mask = run.change.cover
        image, factor = torch.cat([texture, mask]) if len(texture) == 3 else texture * mask + (1 - mask), 1
    else:
        delta = run.change.delta
        image, factor = figures.magnified(torch.zeros_like(delta), delta, high - low)
    return {"image": figures.png(image), "factor": factor, "pixelated": max(image.shape[1:]) <= 96}


def _rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per measurement: on the model itself, in print, and on other models; noise of its size beside them."""
    rows = [{"what": "as learnt, on unseen images", **summary}]
    if "printed" in summary:
        rows.append({"what": "under light and print noise too", **summary["printed"], "control": None})
    rows += [{"what": f"on {row['model']}", **row} for row in summary["transfer"]]
    return rows


def _gallery(run: UniversalRun) -> list[dict[str, Any]]:
    """The first images that count, whether they were fooled or not."""
    rows = run.outcome.attempted.nonzero()[:, 0][:GALLERY]
    if not len(rows):
        return []
    x, _ = run.unseen.batch(rows.tolist())
    changed = run.apply(x, rows)
    low, high = run.model.bounds
    found = []
    for k, row in enumerate(rows.tolist()):
        found.append(
            {
                "row": row,
                "was": _called(run, int(run.outcome.clean[row])),
                "now": _called(run, int(run.outcome.changed[row])),
                "fooled": bool(run.outcome.fooled[row]),
                "images": [figures.png((image[k] - low) / (high - low)) for image in (x, changed)],
                "pixelated": max(x.shape[2:]) <= 96,
            }
        )
    return found


def _photos(run: UniversalRun) -> list[dict[str, Any]]:
    """Photographs with the patch, and what the model says about them."""
    low, high = run.model.bounds
    told = run.summary.get("photos", ())
    return [
        {
            "name": name,
            "image": figures.png((placed - low) / (high - low), 640),
            "was": _called(run, row["clean"]),
            "now": _called(run, row["with_patch"]),
        }
        for (name, _, placed), row in zip(run.photos, told, strict=True)
    ]


def _called(run: UniversalRun, label: int) -> str:
    from robust.universal_run import class_name

    return class_name(run.unseen.classes, label) if label >= 0 else "NaN"


def _facts(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions as (name, value)."""
    found: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        elif isinstance(value, float):
            found.append((prefix, f"{value:.7g}"))
        elif value is not None:
            found.append((prefix, str(value)))

    walk("", {key: value for key, value in summary.items() if key not in _ELSEWHERE})
    return found


# -- figures -----------------------------------------------------------------------------------------------------------


def _over_angle(grid: Grid, summary: Mapping[str, Any]) -> str:
    row = grid.rates[_nearest(grid.scales, 1.0)]
    turn = summary["parameters"]["rotation"]
    pairs = list(zip(grid.angles, row, strict=True))
    return line_svg(pairs, "angle", "angle in degrees, at scale 1", (-turn, turn))


def _over_scale(grid: Grid, summary: Mapping[str, Any]) -> str:
    column = _nearest(grid.angles, 0.0)
    pairs = [(scale, row[column]) for scale, row in zip(grid.scales, grid.rates, strict=True)]
    inside = summary["parameters"]["min_scale"], summary["parameters"]["max_scale"]
    return line_svg(pairs, "scale", "scale, upright", inside)


def _learning(history: Sequence[Mapping[str, float]]) -> str:
    pairs = [(entry["step"], entry["fooled"]) for entry in history]
    return line_svg(pairs, "learning", "step", None, marks=False)


def _nearest(values: Sequence[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda k: abs(values[k] - wanted))


def line_svg(
    pairs: Sequence[tuple[float, float]],
    name: str,
    label: str,
    inside: tuple[float, float] | None,
    *,
    marks: bool = True,
) -> str:
    """A share in [0, 1] against a number, in the page's colours.

    Args:
        pairs: (number, share), ascending, at least two different numbers. name: distinguishes the page's figures.
        label: of the horizontal axis. inside: the range it was learnt for, shaded. marks: dots and their numbers.
    """
    first, last = pairs[0][0], pairs[-1][0]

    def across(value: float) -> float:
        share = min(max((value - first) / ((last - first) or 1.0), 0.0), 1.0)
        return _LEFT + 8 + (_WIDTH - _LEFT - _RIGHT - 16) * share

    def down(share: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share)

    parts = []
    if inside is not None:
        left, right = across(inside[0]), across(inside[1])
        parts.append(
            f'<rect class="learnt" x="{left:.1f}" y="{_TOP}" width="{right - left:.1f}" '
            f'height="{_HEIGHT - _TOP - _BOTTOM}"/>'
        )
    for tick in (0, 25, 50, 75, 100):
        y = down(tick / 100)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 5:.1f}" text-anchor="end">{tick} %</text>')
    points = "L".join(f"{across(value):.1f},{down(share):.1f}" for value, share in pairs)
    parts.append(f'<path class="measured" d="M{points}"/>')
    at = float("-inf")
    for value, share in pairs if marks else (pairs[0], pairs[len(pairs) // 2], pairs[-1]):
        x = across(value)
        if marks:
            parts.append(
                f'<g><title>{value:g}: {share:.1%}</title><circle cx="{x:.1f}" cy="{down(share):.1f}" r="5"/></g>'
            )
        if x - at >= 44:  # a label needs about so much
            at = x
            parts.append(
                f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 20}" text-anchor="middle">{value:g}</text>'
            )
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(
        f'<text class="axis" x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(label)}</text>'
    )
    said = "; ".join(f"{value:g}: {share:.1%}" for value, share in pairs) if marks else label
    return (
        f'<svg class="curve fooled" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-labelledby="{name}-name">'
        f'<title id="{name}-name">Share fooled against {escape(label)}. {escape(said)}</title>'
        f"{''.join(parts)}</svg>"
    )
