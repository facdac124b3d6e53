"""The spectra of a comparison as a picture: PNG or SVG, by the ending of the file's name."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery.analysis.compare import Comparison
from surgery.analysis.norms import Norm
from surgery.analysis.rows import Row
from surgery.runtime.extras import needed

COLUMNS = 4  # panels beside each other
FLOOR = 1e-8  # of the largest singular value: below are zeros, which have no place on a logarithmic axis


def draw(comparison: Comparison, files: Sequence[Path]) -> None:
    """Write a panel for each kind of weight, a line for each block of it: singular values as shares of the largest.

    Files end in .png or .svg. Raises SURG063 without matplotlib.
    """
    matplotlib = needed("matplotlib", "plot", "a plot")
    matplotlib.use("Agg")
    panels = _panels(comparison)
    columns = min(COLUMNS, max(1, len(panels)))
    rows = math.ceil(len(panels) / columns)
    # the same figures give the same file
    with matplotlib.rc_context({"svg.hashsalt": "surgery", "font.size": 8, "axes.titlesize": 8}):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure: Any = Figure(figsize=(4 * columns, 2.8 * rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel, (title, found) in zip(axes, panels.items(), strict=False):
            _panel(panel, title, found, comparison)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        names = f"{comparison.base} to {comparison.target}"
        figure.suptitle(f"singular values of the change from {names}; orange: the rank that suffices, grey: rounding")
        for file in files:
            kind = file.suffix.lower().removeprefix(".")
            stamp = {"Date": None} if kind == "svg" else {"Software": None}
            figure.savefig(file, format=kind, dpi=150, metadata=stamp)


def _panels(comparison: Comparison) -> dict[str, list[Row]]:
    """What changed, by names that differ in nothing but numbers."""
    found: dict[str, list[Row]] = {}
    for row in (*comparison.weights, *comparison.groups):
        if row.size:
            found.setdefault(re.sub(r"(?<![^. ])\d+(?![^. ])", "#", row.name.removesuffix(".weight")), []).append(row)
    return found


def _panel(panel: Any, title: str, rows: Sequence[Row], comparison: Comparison) -> None:
    import matplotlib

    colours = matplotlib.colormaps["viridis"]
    for number, row in enumerate(rows):
        largest = float(row.values.max())
        shares = (row.values / largest).flatten(0, -2).max(0).values if row.values.dim() > 1 else row.values / largest
        shown = [max(float(share), FLOOR) for share in shares]
        colour = colours(number / max(1, len(rows) - 1) * 0.9)
        panel.plot(range(1, len(shown) + 1), shown, color=colour, linewidth=1, marker="." if len(shown) < 32 else "")
    noise = max(row.noise / float(row.values.max()) for row in rows)
    if noise > FLOOR:
        panel.axhspan(FLOOR, noise, color="0.85", zorder=0)
    if comparison.wanted.norm is Norm.spectral and not comparison.wanted.absolute:
        panel.axhline(comparison.wanted.tolerance, color="0.4", linewidth=0.8, linestyle="--")
    ranks = [row.suffices * row.layers for row in rows]
    panel.axvspan(min(ranks) + 0.25, max(ranks) + 0.75, color="tab:orange", alpha=0.4, linewidth=0)
    panel.set_yscale("log")
    panel.set_ylim(max(FLOOR, noise / 30), 1.5)
    panel.set_xlabel("number of the singular value")
    panel.set_ylabel("share of the largest")
    panel.set_title(title if len(rows) == 1 else f"{title}\n{len(rows)} lines, from the first block, dark, to the last")
    panel.grid(alpha=0.3)
