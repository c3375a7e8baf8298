"""ROC curves of membership attacks on logarithmic axes, where low false-positive rates can be read."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any


def figure(found: Mapping[str, Any]) -> bytes:
    """An SVG, the same bytes for the same record.

    Args:
        found: as ``membership.json`` has it.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    least = 10 ** -len(str(max(found["samples"]["members"], found["samples"]["others"], 100)))
    with mpl.rc_context({"svg.hashsalt": "membership", "svg.fonttype": "none", "font.size": 9}):
        drawing = Figure(figsize=(6.4, 5.2), layout="constrained")
        axes = drawing.subplots()
        for number, row in enumerate(found["attacks"]):
            fpr, tpr = zip(*[(max(a, least), max(b, least)) for a, b in row["curve"]], strict=True)
            axes.plot(
                fpr, tpr, color=f"C{number % 10}", ls="-" if number < 10 else "--", lw=1.3, drawstyle="steps-post",
                label=f"{row['name']} ({row['auc']:.3f})",
            )  # fmt: skip
        axes.plot([least, 1], [least, 1], color="0.5", lw=0.9, ls=":", label="chance (0.500)")
        axes.set(
            xscale="log", yscale="log", xlim=(least, 1), ylim=(least, 1), xlabel="false-positive rate",
            ylabel="true-positive rate",
        )  # fmt: skip
        axes.grid(alpha=0.3)
        axes.legend(
            frameon=False, fontsize=7, title="area under the curve", title_fontsize=7, loc="lower right"
        )
        drawn = io.BytesIO()
        drawing.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()
