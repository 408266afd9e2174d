"""The benchmark suite: throughput and latency by precision, adapters, ranks, virtual tokens and prompts.

Each section starts a server of its own and puts load on it as `polygraft bench` does. Writes a table for each
section as Markdown, and everything as JSON. Without a name, all sections run.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.workload import write_adapters, write_prompt_tuning
from polygraft.base.loader import inspect_without_weights
from polygraft.cli.bench.plan import BASE, Choice, Load, plan
from polygraft.cli.bench.report import Report, summarise
from polygraft.cli.bench.run import Measured, closed_loop, open_loop
from polygraft.cli.demo.launcher import ServerProcess, serve_command
from polygraft.cli.demo.scrape import scrape
from polygraft_client import AsyncClient

Row = dict[str, str | float]
W = Load(
    adapters=(BASE,), choice=Choice.UNIFORM, exponent=1.0, prompt_tokens=64, new_tokens=64, shared_tokens=0,
    rate=None, vocabulary_size=49_000, seed=0,
)  # fmt: skip
"""Workload W's shape, over the base alone."""


class Server:
    """A running server and the load on it."""

    def __init__(self, grpc: str, metrics: str) -> None:
        self._grpc, self._metrics = grpc, metrics
        self._seed = 0

    def closed(self, load: Load, *, requests: int, concurrency: int) -> Report:
        """Medians aren't taken here: a section repeats what it wants repeated."""
        return self._measure(
            load, lambda c, p: closed_loop(c, p, requests, concurrency, load.new_tokens, _ignore)
        )

    def open(self, load: Load, *, requests: int) -> Report:
        """Requests at `load.rate`."""
        return self._measure(load, lambda c, p: open_loop(c, p, requests, load.new_tokens, _ignore))

    def _measure(self, load: Load, send: Callable[..., Any]) -> Report:
        async def run() -> Report:
            # Every measurement has prompts of its own, so none finds another's in the cache.
            self._seed += 1
            async with AsyncClient(self._grpc) as client:
                loop = asyncio.get_running_loop()
                started = loop.time()
                results: list[Measured] = await send(client, plan(replace(load, seed=self._seed)))
                return summarise(results, loop.time() - started)

        report = asyncio.run(run())
        assert not report.errors, report.errors
        return report

    def long_prompt(self, load: Load, tokens: int) -> tuple[Report, float]:
        """Eight requests that decode while one long prompt arrives; theirs, and its time to first token."""

        async def run() -> tuple[Report, float]:
            self._seed += 2
            async with AsyncClient(self._grpc) as client:
                short = plan(replace(load, seed=self._seed))
                long = plan(replace(load, seed=self._seed + 1, prompt_tokens=tokens, new_tokens=1))
                others = asyncio.create_task(closed_loop(client, short, 8, 8, load.new_tokens, _ignore))
                await asyncio.sleep(1.0)
                (late,) = await closed_loop(client, long, 1, 1, 1, _ignore)
                return summarise(await others, 1.0), late.first_token

        return asyncio.run(run())

    @property
    def resident_mb(self) -> float:
        """Resident memory of the process."""
        return scrape(self._metrics).resident_bytes / 1e6


def _ignore(_: Measured) -> None:
    """No progress is shown."""


@contextmanager
def server(store: Path | None, *flags: str) -> Iterator[Server]:
    """A server with 128 MiB of KV cache on two threads, warm."""
    stored = ("--adapters", str(store)) if store else ()
    command = serve_command(*stored, "--kv-cache-bytes", "128MiB", "--threads", "2", *flags)
    with ServerProcess(command) as process:
        addresses = process.wait_ready(600, report=lambda line: None)
        running = Server(addresses.grpc, addresses.metrics)
        running.closed(W, requests=16, concurrency=16)
        yield running
        process.stop()


def median(measure: Callable[[], Report], rounds: int = 3) -> Report:
    """The run of median throughput."""
    return sorted((measure() for _ in range(rounds)), key=lambda report: report.output_tokens_per_s)[
        rounds // 2
    ]


def names(count: int) -> list[str]:
    """Of the random adapters."""
    return [f"random-{n}" for n in range(count)]


def figures(report: Report) -> Row:
    """What every table shows."""
    return {
        "tokens/s": round(report.output_tokens_per_s, 1),
        "first token p50, ms": round(report.time_to_first_token_ms["p50"]),
        "first token p99, ms": round(report.time_to_first_token_ms["p99"]),
        "inter-token p50, ms": round(report.inter_token_latency_ms["p50"], 1),
        "inter-token p99, ms": round(report.inter_token_latency_ms["p99"], 1),
    }


def precisions(folder: Path) -> list[Row]:
    """Workload W mixed and on the base, and a single request, in every precision."""
    write_adapters(folder, inspect_without_weights("default"))
    rows: list[Row] = []
    mixed = replace(W, adapters=names(8))
    for precision in ("bfloat16", "float32", "int8", "nf4", "fp4"):
        flags = (
            ("--dtype", precision)
            if precision.endswith(("16", "32"))
            else ("--dtype", "bfloat16", "--quantization", precision)
        )
        with server(folder, *flags) as running:
            for what, load, requests, concurrency in (
                ("16 over 8 LoRAs", mixed, 16, 16),
                ("16, base", W, 16, 16),
                ("1 with LoRA", replace(W, adapters=names(1)), 2, 1),
                ("1, base", W, 2, 1),
            ):
                report = median(lambda: running.closed(load, requests=requests, concurrency=concurrency))  # noqa: B023
                rows.append({"precision": precision, "load": what, **figures(report)})
            rows[-4]["memory, MB"] = round(running.resident_mb)
    return rows


def adapters(folder: Path) -> list[Row]:
    """1 to 1,000 registered LoRAs of rank 8, all of them asked for: 16 requests at a time, 128 in all."""
    write_adapters(folder, inspect_without_weights("default"), count=1000)
    rows: list[Row] = []
    with server(folder, "--quantization", "int8") as running:
        for count in (1, 5, 20, 100, 1000):
            for choice in (Choice.UNIFORM, Choice.ZIPF):
                load = replace(W, adapters=names(count), choice=choice, new_tokens=32)
                report = median(lambda: running.closed(load, requests=64, concurrency=16))  # noqa: B023
                rows.append({"adapters": count, "choice": choice.value, **figures(report)})
        rows[-1]["memory, MB"] = round(running.resident_mb)
    return rows


def ranks(folder: Path) -> list[Row]:
    """Workload W over 8 LoRAs of ranks 4 to 256."""
    rows: list[Row] = []
    for rank in (4, 8, 16, 64, 256):
        store = folder / str(rank)
        write_adapters(store, inspect_without_weights("default"), rank=rank)
        with server(store, "--quantization", "int8") as running:
            base = median(lambda: running.closed(W, requests=16, concurrency=16))
            report = median(
                lambda: running.closed(replace(W, adapters=names(8)), requests=16, concurrency=16)
            )
            share = report.output_tokens_per_s / base.output_tokens_per_s
            rows.append({"rank": rank, "of its base": round(share, 2), **figures(report)})
    return rows


def virtual_tokens(folder: Path) -> list[Row]:
    """Workload W over 8 prompt-tuning adapters of 1 to 256 virtual tokens."""
    rows: list[Row] = []
    for count in (1, 16, 64, 256):
        store = folder / str(count)
        write_prompt_tuning(store, inspect_without_weights("default"), virtual_tokens=count)
        with server(store, "--quantization", "int8") as running:
            load = replace(W, adapters=[f"prompt-{n}" for n in range(8)])
            running.closed(load, requests=16, concurrency=16)
            report = median(lambda: running.closed(load, requests=16, concurrency=16))  # noqa: B023
            rows.append({"virtual tokens": count, **figures(report)})
    return rows


def long_prompts(folder: Path) -> list[Row]:
    """A long prompt that arrives while eight requests decode, by the size of the chunks it is cut into."""
    rows: list[Row] = []
    for chunk in (512, 256):
        flags = ("--quantization", "int8", "--max-num-batched-tokens", str(chunk), "--no-prefix-caching")
        with server(None, *flags) as running:
            for tokens in (0, 1000, 4000):
                load = replace(W, new_tokens=128)
                if tokens:
                    pairs = [running.long_prompt(load, tokens) for _ in range(3)]
                    report = sorted(
                        (pair[0] for pair in pairs), key=lambda r: r.inter_token_latency_ms["p99"]
                    )[1]
                    late = round(1000 * statistics.median(pair[1] for pair in pairs))
                else:
                    report, late = running.closed(load, requests=8, concurrency=8), 0
                latency = report.inter_token_latency_ms
                rows.append(
                    {
                        "tokens a step": chunk,
                        "long prompt": tokens,
                        "its first token, ms": late,
                        "others' inter-token p50, ms": round(latency["p50"], 1),
                        "others' inter-token p99, ms": round(latency["p99"], 1),
                    }
                )
    return rows


def prefix_cache(folder: Path) -> list[Row]:
    """A system prompt of 512 tokens and 64 of each request's own: 16 at a time over 8 LoRAs."""
    write_adapters(folder, inspect_without_weights("default"))
    rows: list[Row] = []
    load = replace(W, adapters=names(8), prompt_tokens=576, shared_tokens=512)
    for flag in ("--prefix-caching", "--no-prefix-caching"):
        with server(folder, "--quantization", "int8", flag) as running:
            # The shared part is drawn from the seed: the same for all of one measurement.
            report = median(lambda: running.closed(load, requests=64, concurrency=16))
            rows.append({"": flag, "cached tokens": report.cached_tokens, **figures(report)})
    return rows


def open_rates(folder: Path) -> list[Row]:
    """Requests over 8 LoRAs at rising rates, until the 99th percentile of the first token is over 2 s."""
    write_adapters(folder, inspect_without_weights("default"))
    rows: list[Row] = []
    with server(folder, "--quantization", "int8") as running:
        for rate in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0):
            load = replace(W, adapters=names(8), rate=rate)
            report = running.open(load, requests=int(20 * rate))
            rows.append({"requests/s": rate, **figures(report)})
            if report.time_to_first_token_ms["p99"] > 2000:
                break
    return rows


SECTIONS = (precisions, adapters, ranks, virtual_tokens, long_prompts, prefix_cache, open_rates)


def as_markdown(rows: Sequence[Row]) -> str:
    """A table with every column that any row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(c, "")) for c in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    choices = [section.__name__ for section in SECTIONS]
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(choices))
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(choices):
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    results: dict[str, Any] = {
        "machine": {
            "processor": torch.backends.cpu.get_cpu_capability(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
    }
    for section in SECTIONS:
        if args.sections and section.__name__ not in args.sections:
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows = section(Path(folder))
        results[section.__name__] = rows
        assert section.__doc__ is not None
        print(f"### {section.__name__}\n\n{section.__doc__}\n\n{as_markdown(rows)}\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
