"""ROC curves, one panel an attack: what each detector flags, against what clean inputs that costs."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

_LEFT = 1e-3  # of the logarithmic axis


def figure(found: Mapping[str, Any]) -> bytes:
    """An SVG, the same bytes for the same record; panels for the attacks that detectors of single inputs met.

    Args:
        found: as ``detection.json`` has it.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = found["detectors"]
    attacks = list(dict.fromkeys(name for row in rows for name in row["attacks"]))
    across = min(len(attacks), 3) or 1
    down = -(-len(attacks) // across) or 1
    with mpl.rc_context({"svg.hashsalt": "detection", "svg.fonttype": "none", "font.size": 8}):
        drawing = Figure(figsize=(3.1 * across + 0.4, 2.9 * down), layout="constrained")
        panels = drawing.subplots(down, across, squeeze=False, sharey=True).ravel()
        for panel, attack in zip(panels, attacks, strict=False):
            for colour, row in enumerate(rows):
                told = row["attacks"].get(attack)
                if not told or not told.get("curve"):
                    continue
                fpr, tpr = zip(*[(max(a, _LEFT), b) for a, b in told["curve"]], strict=True)
                panel.plot(
                    fpr, tpr, color=f"C{colour}", lw=1.2, label=f"{row['name']} ({told['auc']:.2f})",
                    drawstyle="steps-post",
                )  # fmt: skip
            grid = [10 ** (-3 + 3 * k / 50) for k in range(51)]
            panel.plot(grid, grid, color="0.6", lw=0.8, ls=":")
            panel.set(xscale="log", xlim=(_LEFT, 1), ylim=(0, 1), title=attack, xlabel="clean inputs flagged")
            panel.grid(alpha=0.3)
            if not panel.get_legend_handles_labels()[0]:
                continue
            panel.legend(frameon=False, fontsize=6, title="area under the curve", title_fontsize=6)
        for panel in panels[len(attacks) :]:
            panel.set_visible(False)
        panels[0].set_ylabel("adversarial inputs flagged")
        drawn = io.BytesIO()
        drawing.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()
