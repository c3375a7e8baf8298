"""The page of a membership run: the table, the curves on logarithmic axes, doubts and conditions, in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robust.membership_figure import figure
from robust.report import count, percent


def page(found: Mapping[str, Any]) -> str:
    """The page, self-contained.

    Args:
        found: as ``membership.json`` has it.
    """
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(percent=percent, count=count, chance=chance_text, settings=settings_text)
    svg = figure(found).decode()
    return environment.get_template("membership.html.j2").render(
        found=found,
        picture=svg[svg.index("<svg") :],
        facts=_facts(found),
        stored=json.dumps(found, indent=2, ensure_ascii=False),
    )


def chance_text(value: float) -> str:
    """A probability as people read it."""
    return "below 1e-9" if value < 1e-9 else f"{value:.2g}"


def settings_text(row: Mapping[str, Any]) -> str:
    """An attack's settings in words."""
    shown = ("attack", "name", "sees", "auc", "interval", "tpr", "balanced_accuracy", "at_chance", "curve")
    return ", ".join(f"{key}={value}" for key, value in row.items() if key not in shown and value is not None)


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The conditions as (name, value)."""
    references, walk = found["references"], found["walk"]
    facts = [
        ("target", f"{found['target']['name']}, digest {found['target']['digest'][:16]}"),
        ("samples", f"{found['data']['n']:,}, digest {found['data']['digest'][:16]}"),
    ]
    if references["count"] or found["target"]["trained_here"]:
        facts.append(("training", ", ".join(f"{key} {value}" for key, value in walk.items())))
        facts.append(("training seconds, over all threads", count(float(references["training_seconds"]))))
    if "accuracy" in references:
        both = (percent(references["accuracy"][kind]) for kind in ("members", "others"))
        facts.append(("reference models' accuracy", "{} on their members, {} on others".format(*both)))
    device = found["device"]
    return [
        *facts,
        ("seconds in all", count(float(found["seconds"]))),
        ("seed", str(found["seed"])),
        ("device", f"{device['name']} ({device['type']}), {device['cores']} cores"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("commit", found["commit"]),
        ("finished", found["finished"]),
    ]
