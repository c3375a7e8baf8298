"""The README's part that is made from the records: ``python -m robust.experiments.universal.page [--write]``."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust.digest import read_json
from robust.experiments.benchmarks.tables import markdown
from robust.experiments.pages import Page

FOLDER = Path(__file__).parent
README, RESULTS, FIGURE = FOLDER / "README.md", FOLDER / "results", FOLDER / "patches.svg"


def records() -> dict[str, dict[str, Any]]:
    """All records by name, in the order in which the cases stand in the code."""
    from robust.experiments.universal.measure import CASES

    return {
        name: read_json(RESULTS / f"{name}.json") for name in CASES if (RESULTS / f"{name}.json").exists()
    }


def section() -> str:
    """All that the records say."""
    found = records()
    if not found:
        return "no record yet"
    parts = [_conditions(next(iter(found.values()))), _rates(found)]
    if any(record["transfer"] for record in found.values()):
        parts += ["## On other models", _transfer(found)]
    if any("grid" in record for record in found.values()):
        parts += ["## Over scale and angle", "![patches](patches.svg)"]
    return "\n\n".join(parts)


def _conditions(record: Mapping[str, Any]) -> str:
    return (
        f"{record['model']}, {record['data']}: learnt on {record['train']} images, measured on {record['n']:,} others, "
        f"clean accuracy {record['clean_accuracy']:.1%}. Seed {record['seed']}, torch {record['versions']['torch']}, "
        f"{record['device']['name']}, one thread."
    )


def _rates(found: Mapping[str, Mapping[str, Any]]) -> str:
    heads = [
        "case",
        "limit",
        "to",
        "fooled",
        "95 % interval",
        "of",
        "in print and light",
        "noise",
        "learnt in",
        "must",
        "commit",
    ]
    rows = []
    for name, record in found.items():
        printed = record.get("printed") if record["parameters"].get("brightness") else None
        must = (
            ""
            if record["floor"] is None
            else f"> {record['floor']:.0%}: " + ("yes" if record["holds"] else "**no**")
        )
        rows.append(
            [
                f"`{name}`",
                _limit(record),
                record["target_name"] or (f"({record['towards']})" if record.get("towards") else ""),
                _percent(record["success_rate"]),
                " to ".join(_percent(value) for value in record["interval"]),
                f"{record['attempted']:,}",
                _percent(printed["success_rate"]) if printed else "",
                _percent(record["control"]["success_rate"]),
                f"{record['learning']['seconds']:.0f} s",
                must,
                str(record["commit"]),
            ]
        )
    return markdown(heads, rows)


def _transfer(found: Mapping[str, Mapping[str, Any]]) -> str:
    heads = ["case", "model", "clean accuracy", "fooled", "95 % interval", "of", "noise"]
    rows = [
        [
            f"`{name}`",
            f"`{row['model']}`",
            _percent(row["clean_accuracy"]),
            _percent(row["success_rate"]),
            " to ".join(_percent(value) for value in row["interval"]),
            f"{row['attempted']:,}",
            _percent(row["control"]["success_rate"]),
        ]
        for name, record in found.items()
        for row in record["transfer"]
    ]
    return markdown(heads, rows)


def _limit(record: Mapping[str, Any]) -> str:
    threat = record["threat"]
    if "area" in record:
        height, width = record["shape"]
        return f"{height:.4g} × {width:.4g}, {_percent(record['area'])} of the area"
    return f"{threat['norm']} {255 * threat['eps']:.3g}/255"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"


def draw(found: Mapping[str, Mapping[str, Any]], out: Path) -> None:
    """The picture: every patch, and its success over the angle and over the scale."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    from robust.attacks.patch.trained import TrainedPatch

    mpl.rcParams["svg.hashsalt"] = "patches"
    found = {name: record for name, record in found.items() if "grid" in record}
    figure = plt.figure(figsize=(11, 6.5), layout="constrained")
    above: Any
    below: Any
    above, below = (part for part in figure.subfigures(2, 1, squeeze=False, height_ratios=(1, 2.2))[:, 0])
    pictures = above.subplots(1, len(found), squeeze=False)[0]
    over_angle, over_scale = below.subplots(1, 2, sharey=True)
    for place, (name, record) in enumerate(found.items()):
        patch = TrainedPatch.load(RESULTS / f"{name}.safetensors")
        shown = patch.texture * patch.cover + (1 - patch.cover)
        pictures[place].imshow(shown.permute(1, 2, 0).numpy(), interpolation="nearest")
        pictures[place].set_title(name, fontsize=9)
        pictures[place].axis("off")
        grid = record["grid"]
        middle, upright = grid["scales"].index(1.0), grid["angles"].index(0.0)
        style = {"marker": "o", "markersize": 4, "color": f"C{place}", "label": name}
        over_angle.plot(grid["angles"], grid["rates"][middle], **style)
        over_scale.plot(grid["scales"], [row[upright] for row in grid["rates"]], **style)
        ranges = record["parameters"]
    over_angle.axvspan(-ranges["rotation"], ranges["rotation"], color="0.93", zorder=0)
    over_scale.axvspan(ranges["min_scale"], ranges["max_scale"], color="0.93", zorder=0)
    over_angle.set(xlabel="angle in degrees, at scale 1", ylabel="share fooled", ylim=(0, 1))
    over_scale.set(xlabel="scale, upright")
    over_scale.legend(fontsize=8)
    for axis in (over_angle, over_scale):
        axis.grid(alpha=0.3)
    figure.savefig(out, metadata={"Date": None})
    plt.close(figure)


PAGE = Page(
    "robust.experiments.universal.page", README, "records", section, draw=lambda: draw(records(), FIGURE)
)

if __name__ == "__main__":
    sys.exit(PAGE.main(sys.argv[1:]))
