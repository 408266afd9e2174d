"""A chat whose requests share a system prompt, with and without automatic prefix caching."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.suite.experiment import Experiment, Row, interleave, load, put, serving
from benchmarks.suite.stores import lora_store
from polygraft.base.loader import inspect_without_weights

SYSTEM_TOKENS = (128, 512, 1024)
OWN_TOKENS = 48
ADAPTERS = 4
REQUESTS, CONCURRENCY, NEW_TOKENS = 32, 8, 32


def run(rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = lora_store(folder / "store", inspect_without_weights("default"), ADAPTERS)
        sides = {}
        for caching in (True, False):
            flag = "--prefix-caching" if caching else "--no-prefix-caching"
            where = stack.enter_context(serving("--adapters", str(folder / "store"), flag))
            for system in SYSTEM_TOKENS:
                sides[f"{system} {'on' if caching else 'off'}"] = _side(where.grpc, names, system)
        measured = interleave(sides, rounds)
    rows = []
    for system in SYSTEM_TOKENS:
        for caching in ("on", "off"):
            figures = measured[f"{system} {caching}"]
            ratio = figures["tokens/s"] / measured[f"{system} off"]["tokens/s"]
            rows.append({"system prompt, tokens": system, "caching": caching, **figures, "÷ off": ratio})
    return rows


def _side(address: str, names: list[str], system: int) -> Callable[[int], dict[str, float]]:
    def side(n: int) -> dict[str, float]:
        # A system prompt of its own in every round: its first requests fill the cache within the figures.
        asked = load(
            names, prompt_tokens=system + OWN_TOKENS, shared_tokens=system, new_tokens=NEW_TOKENS,
            seed=1000 * system + n,
        )  # fmt: skip
        report = put(address, asked, REQUESTS, CONCURRENCY)
        return {
            "tokens/s": report.output_tokens_per_s,
            "TTFT p50, ms": report.time_to_first_token_ms["p50"],
            "TTFT p99, ms": report.time_to_first_token_ms["p99"],
            "ITL p50, ms": report.inter_token_latency_ms["p50"],
            "prompt tokens cached, %": 100 * report.cached_tokens / (REQUESTS * (system + OWN_TOKENS)),
        }

    return side


EXPERIMENT = Experiment("prefix-cache", run)
