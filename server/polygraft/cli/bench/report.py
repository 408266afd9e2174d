"""What a run came to, for eyes and for programs."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from polygraft.cli.bench.run import Measured

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, slots=True)
class Report:
    """A run. Latencies are milliseconds by percentile.

    Args:
        seconds: from the first request sent to the last one answered.
        errors: failed requests by reason; their latencies aren't counted.
        distinct_adapters: that were asked, the base among them.
    """

    requests: int
    errors: dict[str, int]
    distinct_adapters: int
    seconds: float
    output_tokens: int
    cached_tokens: int
    output_tokens_per_s: float
    requests_per_s: float
    time_to_first_token_ms: dict[str, float]
    inter_token_latency_ms: dict[str, float]
    total_ms: dict[str, float]


def summarise(results: Sequence[Measured], seconds: float) -> Report:
    """Put a run's requests together."""
    good = [result for result in results if result.error is None]
    tokens = sum(result.tokens for result in good)
    return Report(
        requests=len(results),
        errors=dict(Counter(result.error for result in results if result.error is not None)),
        distinct_adapters=len({result.adapter for result in results}),
        seconds=seconds,
        output_tokens=tokens,
        cached_tokens=sum(result.cached_tokens for result in good),
        output_tokens_per_s=tokens / seconds,
        requests_per_s=len(good) / seconds,
        time_to_first_token_ms=percentiles([result.first_token for result in good]),
        inter_token_latency_ms=percentiles([i for result in good for i in result.intervals]),
        total_ms=percentiles([result.total for result in good]),
    )


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds by percentile; empty if there is nothing."""
    if not seconds:
        return {}
    # Linear between neighbours, as numpy and most tools have it.
    found = statistics.quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [*seconds] * 99
    return {f"p{p}": round(found[p - 1] * 1000, 3) for p in PERCENTILES}


def table(report: Report) -> Table:
    """For a terminal."""
    shown = Table(show_header=True, header_style="bold")
    for column in ("", *(f"p{p}" for p in PERCENTILES)):
        shown.add_column(column, justify="left" if not column else "right")
    for name, values in (
        ("time to first token, ms", report.time_to_first_token_ms),
        ("inter-token latency, ms", report.inter_token_latency_ms),
        ("whole request, ms", report.total_ms),
    ):
        shown.add_row(name, *(f"{values[f'p{p}']:.1f}" if values else "-" for p in PERCENTILES))
    return shown


def summary(report: Report) -> str:
    """One line above the table."""
    failed = sum(report.errors.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in report.errors.items())
    return (
        f"{report.requests} requests over {report.distinct_adapters} adapters in {report.seconds:.2f} s: "
        f"{report.output_tokens_per_s:.1f} output tokens/s, {report.requests_per_s:.2f} requests/s, "
        f"{report.cached_tokens} prompt tokens from the cache, {failed} failed"
        + (f" ({reasons})" if failed else "")
    )
