"""Workload W through gRPC, against the base alone, the engine in process and PEFT's mixed batch.

Rounds of all sides are interleaved, so that drift of the machine cancels; each figure is the median of its
rounds. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.adapter_files import write_adapters
from benchmarks.rounds import Figures, in_turn
from benchmarks.sides.protocol import Side
from benchmarks.workload import NEW_TOKENS, requests
from polygraft.base.loader import inspect_without_weights
from polygraft.cli.bench.plan import BASE, Planned
from polygraft.cli.bench.run import closed_loop
from polygraft.cli.demo.launcher import ServerProcess, serve_command
from polygraft.cli.demo.scrape import scrape
from polygraft_client import AsyncClient


async def through_grpc(address: str, mixed: bool) -> dict[str, float]:
    planned = [Planned(name if mixed else BASE, tuple(prompt), 0.0) for prompt, name in requests()]
    async with AsyncClient(address) as client:
        started = time.perf_counter()
        results = await closed_loop(
            client, iter(planned), len(planned), len(planned), NEW_TOKENS, lambda _: None
        )
        seconds = time.perf_counter() - started
    assert not any(result.error for result in results), results
    return {
        "tokens_per_s": sum(result.tokens for result in results) / seconds,
        "ttft_s": statistics.median(result.first_token for result in results),
        "itl_ms": 1000 * statistics.median(statistics.fmean(result.intervals) for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "nf4", "fp4"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--no-peft", action="store_true", help="leave the slow peer out")
    args = parser.parse_args()
    precision = (args.quantization, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        write_adapters(store, inspect_without_weights("default"))
        command = serve_command(
            "--adapters", str(store), "--kv-cache-bytes", "128MiB", "--threads", "2",
            "--quantization", args.quantization, "--dtype", args.dtype,
            "--no-prefix-caching",  # rounds repeat their prompts
        )  # fmt: skip
        started = time.perf_counter()
        with ServerProcess(command) as server:
            where = server.wait_ready(120, report=lambda line: None)
            ready = time.perf_counter() - started
            with Side("benchmarks.sides.engine_in_process", str(store), *precision) as engine:
                sides: dict[str, Callable[[int], dict[str, Any]]] = {
                    "mixed": lambda _: asyncio.run(through_grpc(where.grpc, mixed=True)),
                    "base": lambda _: asyncio.run(through_grpc(where.grpc, mixed=False)),
                    "engine_mixed": lambda _: engine.round("mixed"),
                }
                if args.no_peft:
                    measured = in_turn(sides, args.rounds)
                else:
                    with Side("benchmarks.peers.peft", str(store), *precision, "mixed") as peft:
                        measured = in_turn(sides | {"peft_mixed": lambda _: peft_round(peft)}, args.rounds)
            memory = scrape(where.metrics).resident_bytes
            server.stop()
    report(measured, {"ready_s": ready, "resident_mb": memory / 1e6, "precision": "-".join(precision)})


def peft_round(peft: Side) -> dict[str, float]:
    return {"tokens_per_s": peft.round("mixed-16")["tokens_per_s"]}


def report(measured: dict[str, list[Figures]], extra: dict[str, Any]) -> None:
    """A table, then everything as one line of JSON."""
    medians = {
        f"{name}_{key}": statistics.median(one[key] for one in figures)
        for name, figures in measured.items()
        for key in figures[0]
    }

    def ratio(a: str, b: str) -> float | None:
        if b not in measured:
            return None
        pairs = zip(measured[a], measured[b], strict=True)
        return statistics.median(x["tokens_per_s"] / y["tokens_per_s"] for x, y in pairs)

    result = {
        **extra,
        **medians,
        "mixed_over_base": ratio("mixed", "base"),
        "mixed_over_engine": ratio("mixed", "engine_mixed"),
        "mixed_over_peft": ratio("mixed", "peft_mixed"),
    }
    for key, value in result.items():
        print(f"{key:28} {value if isinstance(value, str | None) else round(value, 3)}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
