"""Requests at random times at rising rates, until a 99th percentile breaks."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.suite.experiment import Experiment, Plot, Row, load, put, serving
from benchmarks.suite.stores import lora_store
from polygraft.base.loader import inspect_without_weights

FIRST_RATE, GROWTH = 1.0, 1.3
SECONDS = 8
"""How long a rate is kept, times the rounds."""
BROKEN = {"TTFT p99, ms": 3000.0, "ITL p99, ms": 250.0}
"""What nobody would call interactive any more."""


def run(rounds: int) -> list[Row]:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        names = lora_store(Path(folder) / "store", inspect_without_weights("default"))
        with serving("--adapters", str(Path(folder) / "store")) as where:
            put(where.grpc, load(names), 16)
            rate = FIRST_RATE
            while not rows or all(rows[-1][figure] < limit for figure, limit in BROKEN.items()):
                report = put(
                    where.grpc,
                    load(names, rate=rate, seed=len(rows)),
                    max(20, int(rate * SECONDS * rounds)),
                )
                rows.append(
                    {
                        "requests/s": rate,
                        "tokens/s": report.output_tokens_per_s,
                        "TTFT p50, ms": report.time_to_first_token_ms["p50"],
                        "TTFT p99, ms": report.time_to_first_token_ms["p99"],
                        "ITL p50, ms": report.inter_token_latency_ms["p50"],
                        "ITL p99, ms": report.inter_token_latency_ms["p99"],
                    }
                )
                print("  ", {key: round(value, 1) for key, value in rows[-1].items()}, flush=True)
                rate *= GROWTH
    return rows


EXPERIMENT = Experiment("open-loop", run, Plot("requests/s", ("ITL p50, ms", "ITL p99, ms")))
