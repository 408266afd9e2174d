"""The plots of a comparison's report, as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from typing import TypeVar

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from polygraft.cli.bench.compare.result import Comparison

T = TypeVar("T")
COLOURS = {"base": "#888888", "unmerged": "#1f77b4", "merged": "#d62728", "auto": "#2ca02c"}


def plots(found: Comparison) -> dict[str, str]:
    """SVG elements by title; those that have nothing to show are left out."""
    drawn = {
        "Latency against concurrency": _latency(found),
        "Throughput against distinct adapters": _throughput(found),
        "Latency against size": _sizes(found),
    }
    return {title: svg for title, svg in drawn.items() if svg}


def _latency(found: Comparison) -> str:
    mixes = list(dict.fromkeys(cell.mix for cell in found.cells))

    def draw(axes: Axes, mix: str) -> None:
        for path in dict.fromkeys(cell.path for cell in found.cells):
            own = [cell for cell in found.cells if (cell.mix, cell.path) == (mix, path)]
            x = [cell.concurrency for cell in own]
            axes.plot(
                x, [c.inter_token_latency_ms["p50"] for c in own], "o-", label=path, color=COLOURS[path]
            )
            axes.plot(x, [c.inter_token_latency_ms["p99"] for c in own], ":", color=COLOURS[path])
        axes.set(title=f"adapters: {mix}", xlabel="requests at a time", ylim=(0, None))
        axes.set_xscale("log", base=2)

    return _svg(mixes, draw, "inter-token latency, ms (p50; dotted p99)")


def _throughput(found: Comparison) -> str:
    cells = [cell for cell in found.cells if not cell.mix.startswith("zipf")]
    concurrencies = sorted({cell.concurrency for cell in cells})

    def draw(axes: Axes, concurrency: int) -> None:
        for path in dict.fromkeys(cell.path for cell in cells):
            own = sorted(
                (c.distinct_adapters, c.tokens_per_s)
                for c in cells
                if (c.concurrency, c.path) == (concurrency, path)
            )
            axes.plot([n for n, _ in own], [rate for _, rate in own], "o-", label=path, color=COLOURS[path])
        at = found.crossover.get(str(concurrency))
        if at is not None:
            axes.axvline(at, color="black", linestyle="--", linewidth=0.8)
            axes.annotate(
                f"side paths win\nfrom {at} on", (at, 0), (3, 4), textcoords="offset points", fontsize=7
            )
        axes.set(title=f"{concurrency} requests", xlabel="distinct adapters", ylim=(0, None))
        axes.set_xscale("log", base=2)

    return _svg(concurrencies, draw, "tokens/s")


def _sizes(found: Comparison) -> str:
    kinds = list(dict.fromkeys(size.kind for size in found.sizes))

    def draw(axes: Axes, kind: str) -> None:
        for path in dict.fromkeys(size.path for size in found.sizes if size.kind == kind):
            own = [size for size in found.sizes if (size.kind, size.path) == (kind, path)]
            axes.plot(
                [s.size for s in own],
                [s.inter_token_latency_ms for s in own],
                "o-",
                label=path,
                color=COLOURS[path],
            )
        axes.set(xlabel=kind, ylim=(0, None))
        axes.set_xscale("log", base=2)

    return _svg(kinds, draw, "inter-token latency, ms")


def _svg(panels: Iterable[T], draw: Callable[[Axes, T], None], label: str) -> str:
    """Panels side by side; "" if there are none."""
    several = list(panels)
    if not several:
        return ""
    with plt.rc_context({"svg.hashsalt": "polygraft", "svg.fonttype": "none", "font.size": 8}):
        figure, axes = plt.subplots(
            1, len(several), figsize=(3.2 * len(several) + 0.6, 3), squeeze=False, sharey=True
        )
        for axis, panel in zip(axes[0], several, strict=True):
            draw(axis, panel)
            axis.grid(alpha=0.3)
        axes[0][0].set_ylabel(label)
        axes[0][0].legend()
        figure.tight_layout()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        plt.close(figure)
    return file.getvalue()[file.getvalue().index("<svg") :]
