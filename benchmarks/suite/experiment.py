"""What an experiment is, and how one measures."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.rounds import Figures, in_turn
from polygraft.cli.bench.plan import Choice, Load, plan
from polygraft.cli.bench.report import Report, summarise
from polygraft.cli.bench.run import closed_loop, open_loop
from polygraft.cli.demo.launcher import Addresses, ServerProcess, serve_command
from polygraft_client import AsyncClient

Row = dict[str, Any]
READY_SECONDS = 600.0
VOCABULARY = 40_000
"""Prompts are random ids below it: ordinary tokens of the default model."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Columns of the rows: `ys` against `x`; with `by`, a line for each of its values."""

    x: str
    ys: tuple[str, ...]
    logarithmic: bool = False
    by: str = ""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One question.

    Args:
        name: in file names and in the document's markers.
        run: rows with the same columns, units in their names, given how many rounds to count.
    """

    name: str
    run: Callable[[int], list[Row]]
    plot: Plot | None = None


@contextlib.contextmanager
def serving(*flags: str) -> Iterator[Addresses]:
    """A server of its own, with 2 threads, int8 unless the flags say otherwise."""
    defaults = ("--threads", "2", "--kv-cache-bytes", "512MiB", "--quantization", "int8")
    with ServerProcess(serve_command(*defaults, *flags)) as server:
        yield server.wait_ready(READY_SECONDS, report=lambda line: None)
        server.stop()


@functools.cache
def loop() -> asyncio.Runner:
    """One event loop for all loads: grpc's poller doesn't outlive the loop that it was started on."""
    return asyncio.Runner()


def load(
    adapters: Sequence[str],
    *,
    choice: Choice = Choice.UNIFORM,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    shared_tokens: int = 0,
    rate: float | None = None,
    seed: int = 0,
) -> Load:
    """A load as `polygraft bench` has it."""
    return Load(
        adapters, choice, 1.0, prompt_tokens, new_tokens, shared_tokens, rate, VOCABULARY, seed
    )  # fmt: skip


def put(address: str, asked: Load, requests: int, concurrency: int = 16) -> Report:
    """Put a load on a server; raises RuntimeError if a request failed."""

    async def run() -> Report:
        async with AsyncClient(address) as client:
            started = time.perf_counter()
            if asked.rate is None:
                results = await closed_loop(
                    client, plan(asked), requests, concurrency, asked.new_tokens, lambda _: None
                )
            else:
                results = await open_loop(client, plan(asked), requests, asked.new_tokens, lambda _: None)
            return summarise(results, time.perf_counter() - started)

    report = loop().run(run())
    if report.errors:
        raise RuntimeError(f"requests failed: {report.errors}")
    return report


def interleave(sides: Mapping[str, Callable[[int], Figures]], rounds: int) -> dict[str, dict[str, float]]:
    """Medians by side of rounds in turn."""
    return {
        name: {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        for name, figures in in_turn(sides, rounds).items()
    }


def speed(report: Report) -> dict[str, float]:
    """The figures that most experiments show."""
    return {
        "tokens/s": report.output_tokens_per_s,
        "TTFT p50, ms": report.time_to_first_token_ms["p50"],
        "ITL p50, ms": report.inter_token_latency_ms["p50"],
    }
