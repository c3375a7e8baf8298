"""The curve of certified accuracy, with an attack's curve beside it: what is proved, and what is not yet broken."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any


def curve(found: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> bytes:
    """An SVG, the same bytes for the same certificate: accuracy against the radius.

    Args:
        found: as ``certificate.json`` has it; its ``verdict`` is drawn where there is one.
        records: one a sample, with class, label and radius.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    n = max(len(records), 1)
    reached = sorted(record["radius"] for record in records if record["class"] == record["label"])
    points = [(0.0, len(reached) / n)]
    points += [(radius, (len(reached) - k - 1) / n) for k, radius in enumerate(reached)]
    told = found["certificate"]
    estimate = told["kind"] == "estimate"
    with mpl.rc_context({"svg.hashsalt": "certificate", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        axes = figure.subplots()
        word = "estimated" if estimate else "certified"
        axes.step(*zip(*points, strict=True), where="post", label=f"{word} ({told['method']})", color="C0")
        for row in found["certified_accuracy"]:
            low, high = row["interval"]
            axes.errorbar(
                row["radius"], row["accuracy"], fmt="o", ms=3, color="C0", lw=1,
                yerr=[[max(row["accuracy"] - low, 0)], [max(high - row["accuracy"], 0)]],
            )  # fmt: skip
        if (beside := found.get("verdict")) is not None:
            label = f"not broken by {beside['suite']} ({beside['model']})"
            axes.plot(*zip(*beside["curve"], strict=True), "s--", color="C3", ms=4, label=label)
        axes.set_xlabel(f"{found['norm']} radius")
        axes.set_ylabel("accuracy")
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()
