"""Puts figures into docs/performance.md, between the markers of an experiment, and draws its plot."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt

from benchmarks.suite.experiment import Experiment, Plot, Row


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


_MOST_TICKS = 8


def draw(plot: Plot, rows: Sequence[Row], file: Path) -> None:
    """Write an SVG that is the same for the same figures."""
    plt.rcParams.update({"svg.hashsalt": "polygraft", "svg.fonttype": "none", "font.size": 9})
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get(plot.by, "")), []).append(row)
    figure, axes = plt.subplots(1, len(groups), figsize=(max(6, 3 * len(groups)), 3), squeeze=False)
    for axis, (title, group) in zip(axes[0], groups.items(), strict=True):
        for at, column in enumerate(plot.ys):
            style = "o-" if at == 0 else "--"
            axis.plot([row[plot.x] for row in group], [row[column] for row in group], style, label=column)
        axis.set_title(title, fontsize=8)
        axis.set_xlabel(plot.x)
        axis.set_ylim(bottom=0)
        if plot.logarithmic:
            axis.set_xscale("log", base=2 if plot.by else 10)
            # 1, 2, 4 rather than powers; of many values only the powers of ten.
            values = sorted({row[plot.x] for row in group})
            if len(values) <= _MOST_TICKS:
                axis.set_xticks(values, [f"{value:g}" for value in values])
                axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def insert(document: Path, name: str, text: str) -> None:
    """Replace what stands between a name's two markers.

    Raises:
        ValueError: the document has no such markers.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    old = document.read_text()
    new, found = re.subn(
        re.escape(begin) + ".*?" + re.escape(end), lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"{document}: {found} places for {name}")
    document.write_text(new)


def publish(experiment: Experiment, rows: Sequence[Row], document: Path) -> None:
    """Table and plot of an experiment."""
    text = table(rows)
    if experiment.plot is not None:
        plot = document.parent / "plots" / f"{experiment.name}.svg"
        draw(experiment.plot, rows, plot)
        text += f"\n\n![{experiment.name}]({plot.relative_to(document.parent)})"
    insert(document, experiment.name, text)
