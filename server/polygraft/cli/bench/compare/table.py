"""A comparison as rich tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.filesize import decimal
from rich.table import Table

from polygraft.cli.bench.compare.result import Comparison, Figures
from polygraft.cli.bench.compare.verdict import count, verdicts


def tables(found: Comparison) -> list[Table]:
    """Everything, a table for each question that was asked."""
    shown = [_cells(found.cells)]
    if found.pairs:
        shown.append(
            _table(
                f"one request in flight, {count(found.pairs[0].rounds, 'round')}, the paths in turn",
                ("path", "ITL p50, ms", "to base"),
                [(p.path, f"{p.inter_token_latency_ms:.2f}", f"{p.ratio_to_base:.3f}") for p in found.pairs],
            )
        )
    if found.phases:
        shown.append(
            _table(
                "changing load, tokens/s",
                ("phase", "path", "settled", "transition"),
                [
                    (p.phase, p.path, f"{p.tokens_per_s:.1f}", f"{p.transition_tokens_per_s:.1f}")
                    for p in found.phases
                ],
            )
        )
    if found.sizes:
        shown.append(
            _table(
                "one request in flight, by the adapter's size",
                ("size", "path", "ITL p50, ms"),
                [(f"{s.kind} {s.size}", s.path, f"{s.inter_token_latency_ms:.2f}") for s in found.sizes],
            )
        )
    if found.copies:
        shown.append(_copies(found))
    return shown


def _cells(cells: Sequence[Figures]) -> Table:
    counted = any(cell.steps is not None for cell in cells)
    columns = [
        "adapters", "requests", "path", "tokens/s", "TTFT p50", "p95", "p99", "ITL p50", "p95", "p99",
        *(("steps", "merged", "switches") if counted else ()),
    ]  # fmt: skip
    rows = []
    for cell in cells:
        row = [cell.mix, str(cell.concurrency), cell.path, f"{cell.tokens_per_s:.1f}"]
        for latency in (cell.time_to_first_token_ms, cell.inter_token_latency_ms):
            row += [f"{latency[p]:.1f}" for p in ("p50", "p95", "p99")]
        if counted:
            row += [str(cell.steps), str(cell.merged_steps), str(cell.switches)]
        rows.append(row)
    return _table("by mix, concurrency and path (latencies in ms)", columns, rows)


def _copies(found: Comparison) -> Table:
    return _table(
        "merged copies: memory, and logits compared with unmerged",
        ("adapter", "rank", "memory", "kept in", "merged in", "mean off", "largest", "greedy the same"),
        [
            (
                copy.adapter,
                str(copy.rank),
                decimal(copy.memory_bytes),
                copy.dtype,
                f"{copy.merge_seconds:.3f} s",
                "-" if copy.mean_logit_difference is None else f"{copy.mean_logit_difference:.3g}",
                "-" if copy.largest_logit_difference is None else f"{copy.largest_logit_difference:.3g}",
                "-" if copy.greedy_agreement is None else f"{copy.greedy_agreement:.1%}",
            )
            for copy in found.copies
        ],
    )


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        numeric = column not in ("path", "phase", "adapter", "adapters", "size", "kept in")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def conclusions(found: Comparison) -> list[str]:
    """Sentences that say what the tables show."""
    lines = [verdict.sentence() for verdict in verdicts(found.cells)]
    if found.switch_ms is not None:
        lines.append(f"switching to another merged copy adds {found.switch_ms:.2f} ms to a first token")
    if found.resident_bytes is not None:
        lines.append(f"the server uses {decimal(found.resident_bytes)} of memory at the end")
    return lines
