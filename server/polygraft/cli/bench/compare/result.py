"""What a comparison comes to, for eyes and for programs. Latencies are milliseconds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from polygraft.cli.bench.compare.scraped import Counts
from polygraft.cli.bench.report import percentiles
from polygraft.cli.bench.run import Measured


@dataclass(frozen=True, slots=True)
class Round:
    """One run of one cell on one path."""

    results: Sequence[Measured]
    seconds: float
    counts: Counts | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers over the run's time."""
        return sum(result.tokens for result in self.results) / self.seconds


@dataclass(frozen=True, slots=True)
class Figures:
    """A cell on one path: the median of its rounds' rates, percentiles over all its requests.

    Args:
        steps, merged_steps, switches: of the rounds together; None without the server's metrics.
        rates: each round's tokens per second.
    """

    mix: str
    distinct_adapters: int
    concurrency: int
    path: str
    tokens_per_s: float
    time_to_first_token_ms: dict[str, float]
    inter_token_latency_ms: dict[str, float]
    steps: int | None
    merged_steps: int | None
    switches: int | None
    rates: tuple[float, ...] = ()


def figures(mix: str, distinct: int, concurrency: int, path: str, rounds: Sequence[Round]) -> Figures:
    """Put a cell's rounds together."""
    results = [result for one in rounds for result in one.results]
    counts = [one.counts for one in rounds if one.counts is not None]
    return Figures(
        mix,
        distinct,
        concurrency,
        path,
        statistics.median(one.tokens_per_s for one in rounds),
        percentiles([result.first_token for result in results]),
        percentiles([interval for result in results for interval in result.intervals]),
        sum(c.steps for c in counts) if counts else None,
        sum(c.merged_steps for c in counts) if counts else None,
        sum(c.switches for c in counts) if counts else None,
        tuple(one.tokens_per_s for one in rounds),
    )


@dataclass(frozen=True, slots=True)
class Pairs:
    """One request at a time, the paths in turn: medians, and each path's ratio to the base.

    Args:
        ratio_to_base: median over the rounds of this path's inter-token latency by the base's.
    """

    path: str
    rounds: int
    inter_token_latency_ms: float
    ratio_to_base: float


@dataclass(frozen=True, slots=True)
class Copy:
    """What merging one adapter cost, and how exact it is; see the contract's MergedCopy."""

    adapter: str
    rank: int
    memory_bytes: int
    dtype: str
    merge_seconds: float
    mean_logit_difference: float | None
    largest_logit_difference: float | None
    greedy_agreement: float | None


@dataclass(frozen=True, slots=True)
class Size:
    """Inter-token latency of one request with an adapter of a size; `kind` is "rank" or "virtual tokens"."""

    kind: str
    size: int
    adapter: str
    path: str
    inter_token_latency_ms: float


@dataclass(frozen=True, slots=True)
class Phase:
    """Tokens a second on one path in one phase of the changing load, after its transition and in it."""

    phase: str
    path: str
    tokens_per_s: float
    transition_tokens_per_s: float


@dataclass(slots=True)
class Comparison:
    """Everything.

    Args:
        switch_ms: how much longer the first token takes if the step before ran on another copy.
        crossover: by concurrency, the number of distinct adapters from which on unmerged is clearly faster
            than merged; None if there is none.
    """

    model: str
    dtype: str
    quantization: str
    server_version: str
    machine: str
    prompt_tokens: int
    new_tokens: int
    rounds: int
    cells: list[Figures] = field(default_factory=list)
    pairs: list[Pairs] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    sizes: list[Size] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    switch_ms: float | None = None
    resident_bytes: int | None = None
    crossover: dict[str, int | None] = field(default_factory=dict)
