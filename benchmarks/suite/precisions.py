"""Workload W, the base alone and single requests, in every precision."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.suite.experiment import Experiment, Row, interleave, load, put, serving, speed
from benchmarks.suite.stores import lora_store
from polygraft.base.loader import inspect_without_weights
from polygraft.cli.bench.plan import BASE
from polygraft.cli.demo.scrape import scrape

PRECISIONS = {
    "bfloat16": ("--quantization", "none", "--dtype", "bfloat16"),
    "int8": ("--quantization", "int8"),
    "int8, head int8": ("--quantization", "int8", "--head-quantization", "int8"),
    "nf4": ("--quantization", "nf4"),
    "fp4": ("--quantization", "fp4"),
    "float32": ("--quantization", "none", "--dtype", "float32"),
}


def run(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        names = lora_store(Path(folder) / "store", inspect_without_weights("default"))
        return [
            _one(name, flags, str(Path(folder) / "store"), names, rounds)
            for name, flags in PRECISIONS.items()
        ]


def _one(precision: str, flags: tuple[str, ...], store: str, names: list[str], rounds: int) -> Row:
    # The cache's size is part of W: memory is compared.
    with serving("--adapters", store, "--kv-cache-bytes", "128MiB", *flags) as where:

        def side(adapters: list[str], concurrency: int) -> Callable[[int], dict[str, float]]:
            return lambda n: speed(put(where.grpc, load(adapters, seed=n), concurrency, concurrency))

        measured = interleave(
            {
                "mixed": side(names, 16),
                "base": side([BASE], 16),
                "one request, LoRA": side(names[:1], 1),
                "one request, base": side([BASE], 1),
            },
            rounds,
        )
        mixed, base = measured["mixed"], measured["base"]
        return {
            "precision": precision,
            "W mixed, tokens/s": mixed["tokens/s"],
            "base, tokens/s": base["tokens/s"],
            "mixed ÷ base": mixed["tokens/s"] / base["tokens/s"],
            "one request with LoRA, tokens/s": measured["one request, LoRA"]["tokens/s"],
            "one request, tokens/s": measured["one request, base"]["tokens/s"],
            "W TTFT p50, ms": mixed["TTFT p50, ms"],
            "W ITL p50, ms": mixed["ITL p50, ms"],
            "resident, MB": scrape(where.metrics).resident_bytes / 1e6,
        }


EXPERIMENT = Experiment("precisions", run)
