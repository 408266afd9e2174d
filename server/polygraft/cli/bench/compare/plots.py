"""The plots of a comparison's report, as SVG that follows the page's colours."""

from __future__ import annotations

import io

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter, NullLocator, ScalarFormatter

from polygraft.cli.bench.compare.panels import Panel

STYLES = {
    "base": ("#8a8a8a", "D"),
    "unmerged": ("#1f83d1", "o"),
    "merged": ("#d9642b", "s"),
    "auto": ("#17977a", "^"),
}
"""Colour and marker by path: told apart without colours too, and legible on light and dark pages."""
_INK = "#010203"
"""Stands for the page's own text colour until the SVG is written."""


def svg(panel: Panel, y_label: str) -> str:
    """A panel as an SVG element."""
    with plt.rc_context({
        "svg.hashsalt": "polygraft", "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif",
        "text.color": _INK, "axes.labelcolor": _INK, "axes.edgecolor": _INK, "xtick.color": _INK,
        "ytick.color": _INK, "axes.spines.top": False, "axes.spines.right": False,
    }):  # fmt: skip
        figure, axes = plt.subplots(figsize=(3.6, 2.7), layout="constrained")
        for curve in panel.curves:
            colour, marker = STYLES[curve.path]
            axes.plot(curve.x, curve.y, marker=marker, markersize=4.5, color=colour, linewidth=1.6)
            if curve.low:
                axes.vlines(curve.x, curve.low, curve.high, color=colour, linewidth=3, alpha=0.35)
        axes.set_xscale("log", base=2)
        axes.set_xticks(panel.ticks, [str(tick) for tick in panel.ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.margins(x=0.08)
        if panel.is_log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(*panel.limits)
        axes.grid(alpha=0.25, color=_INK, linewidth=0.6)
        axes.set(xlabel=panel.x_label, ylabel=y_label)
        if panel.title:
            axes.set_title(f"{panel.title}\n{panel.note}" if panel.note else panel.title, fontsize=9.5)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    drawn = file.getvalue()
    return drawn[drawn.index("<svg") :].replace(_INK, "currentColor")
