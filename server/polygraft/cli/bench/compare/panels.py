"""Decides what the report's plots show: small panels of curves, with limits that include every point."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from polygraft.cli.bench.compare.result import Comparison, Figures
from polygraft.cli.bench.compare.verdict import count, verdicts

_LOG_FROM = 20.0
"""From this ratio of the largest to the smallest value on, the axis is logarithmic."""
_ROOM = 1.08
"""Headroom above the largest value, as a factor."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One path's values; `low` and `high` are those of the slowest and the fastest round, if given."""

    path: str
    x: tuple[int, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Panel:
    """One small plot.

    Args:
        note: a second, shorter line of the title.
        ticks: of the x axis, which is logarithmic.
        limits: of the y axis. Panels of latencies share them; those of throughput have their own, since it
            grows with the requests in flight.
    """

    title: str
    note: str
    x_label: str
    curves: tuple[Curve, ...]
    ticks: tuple[int, ...]
    limits: tuple[float, float]
    is_log: bool


@dataclass(frozen=True, slots=True)
class Row:
    """Panels that answer one question."""

    title: str
    y_label: str
    panels: tuple[Panel, ...]


Draft = tuple[str, str, list[Curve]]
"""A panel's title, note and curves, before the row's limits are known."""


def rows(found: Comparison) -> list[Row]:
    """Return the report's rows, without those that have nothing to show."""
    drafts = [
        ("Throughput by distinct adapters", "tokens/s", "distinct adapters", _throughput(found)),
        ("Typical time between tokens (p50)", "ms", "requests in flight", _latency(found, "p50")),
        ("Slowest time between tokens (p99)", "ms", "requests in flight", _latency(found, "p99")),
        *(
            (f"Time between tokens by {kind}, one request in flight (p50)", "ms", kind, [_sizes(found, kind)])
            for kind in dict.fromkeys(size.kind for size in found.sizes)
        ),
    ]
    return [_row(*draft) for draft in drafts if draft[3]]


def _throughput(found: Comparison) -> list[Draft]:
    cells = [cell for cell in found.cells if not cell.mix.startswith("zipf")]
    told = {verdict.concurrency: verdict for verdict in verdicts(found.cells)}
    panels = []
    for concurrency in sorted({cell.concurrency for cell in cells}):
        own = [cell for cell in cells if cell.concurrency == concurrency]
        verdict = told.get(concurrency)
        curves = _curves(
            own, lambda cell: cell.distinct_adapters, lambda cell: cell.tokens_per_s, spread=True
        )
        note = verdict.short() if verdict else ""
        panels.append((f"{count(concurrency, 'request')} in flight", note, curves))
    return panels


def _latency(found: Comparison, percentile: str) -> list[Draft]:
    panels = []
    for mix in dict.fromkeys(cell.mix for cell in found.cells):
        own = [cell for cell in found.cells if cell.mix == mix and cell.inter_token_latency_ms]
        curves = _curves(
            own, lambda cell: cell.concurrency, lambda cell: cell.inter_token_latency_ms[percentile]
        )
        if curves:
            panels.append((_mix_title(mix), "", curves))
    return panels


def _sizes(found: Comparison, kind: str) -> Draft:
    own = [size for size in found.sizes if size.kind == kind]
    curves = []
    for path in dict.fromkeys(size.path for size in own):
        points = sorted((s.size, s.inter_token_latency_ms) for s in own if s.path == path)
        curves.append(Curve(path, tuple(x for x, _ in points), tuple(y for _, y in points)))
    return "", "", curves


def _mix_title(mix: str) -> str:
    name, _, number = mix.partition(" ")
    return f"{number} adapters by Zipf's law" if name == "zipf" else count(int(mix), "adapter")


def _curves(
    cells: Sequence[Figures],
    x: Callable[[Figures], int],
    y: Callable[[Figures], float],
    *,
    spread: bool = False,
) -> list[Curve]:
    curves = []
    for path in dict.fromkeys(cell.path for cell in cells):
        own = sorted((cell for cell in cells if cell.path == path), key=x)
        low = tuple(min(cell.rates or (y(cell),)) for cell in own) if spread else ()
        high = tuple(max(cell.rates or (y(cell),)) for cell in own) if spread else ()
        curves.append(Curve(path, tuple(map(x, own)), tuple(map(y, own)), low, high))
    return curves


def _row(title: str, y_label: str, x_label: str, drafts: Sequence[Draft]) -> Row:
    shared = [curve for _, _, own in drafts for curve in own]
    panels = []
    for head, note, own in drafts:
        # Throughput has a spread, and limits of its own.
        limits, is_log = _limits(own if any(curve.low for curve in own) else shared)
        panels.append(Panel(head, note, x_label, tuple(own), _ticks(own), limits, is_log))
    return Row(title, y_label, tuple(panels))


def _ticks(curves: Iterable[Curve]) -> tuple[int, ...]:
    return tuple(sorted({x for curve in curves for x in curve.x}))


def _limits(curves: Sequence[Curve]) -> tuple[tuple[float, float], bool]:
    """Return limits that include all values, and whether the axis is logarithmic."""
    values = [value for curve in curves for value in (*curve.y, *curve.low, *curve.high)]
    finite = [value for value in values if math.isfinite(value) and value >= 0]
    least, most = min(finite, default=0.0), max(finite, default=0.0)
    if least > 0 and most / least >= _LOG_FROM:
        return (least / _ROOM**2, most * _ROOM**2), True
    return (0.0, most * _ROOM or 1.0), False
