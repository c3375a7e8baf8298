"""The transfer matrix as a picture: one heat map an attack, sources down, targets across."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from robust.attacks.transfer.matrix import TransferTable


def heat_map(table: TransferTable) -> bytes:
    """An SVG of the matrix, the same bytes for the same table.

    Each cell shows the success in percent, below it what it gains on the first attack with half of its 95 % interval.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    names, targets = list(table.attacks), [str(model["name"]) for model in table.models]
    found = {(cell.attack, cell.source, cell.target): cell for cell in table.cells}
    across = min(len(names), 4)
    down = math.ceil(len(names) / across)
    size = (1.2 + across * (0.9 * len(targets) + 0.9), 0.6 + down * (0.7 * len(table.sources) + 1.1))
    with mpl.rc_context({"svg.hashsalt": "transfer", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
        for k, panel in enumerate(axes.flat):
            if k >= len(names):
                panel.set_visible(False)
                continue
            name = names[k]
            values = [
                [100 * found[name, s, t].rate if (name, s, t) in found else math.nan for t in targets]
                for s in table.sources
            ]
            image = panel.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
            panel.set_title(name)
            panel.set_xticks(range(len(targets)), targets, rotation=30, ha="right")
            panel.set_yticks(range(len(table.sources)), table.sources)
            for i, source in enumerate(table.sources):
                for j, target in enumerate(targets):
                    cell = found.get((name, source, target))
                    if cell is None or not cell.n:
                        continue
                    text = f"{100 * cell.rate:.0f}"
                    if k:
                        text += f"\n{100 * cell.gain:+.0f} ± {100 * cell.gain_error:.0f}"
                    colour = "black" if cell.rate > 0.6 else "white"
                    panel.text(j, i, text, ha="center", va="center", color=colour, fontsize=7)
        figure.colorbar(image, ax=axes.ravel().tolist(), label="success, %")
        figure.supxlabel("target")
        figure.supylabel("source")
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()
