"""What an adapter's size costs: LoRA by rank, prefixes by virtual tokens."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks.suite.experiment import Experiment, Plot, Row, interleave, load, put, serving, speed
from benchmarks.suite.stores import prefix_store, rank_store
from polygraft.base.loader import inspect_without_weights
from polygraft.cli.bench.plan import BASE

RANKS = (4, 8, 16, 32, 64, 128, 256)
LENGTHS = (1, 4, 16, 64, 256)
EACH = 4
"""Adapters of one rank in a step."""


def ranks(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        names = rank_store(store, inspect_without_weights("default"), RANKS, EACH)
        return _rows("rank", store, names, rounds)


def virtual_tokens(rounds: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        names = prefix_store(store, inspect_without_weights("default"), LENGTHS)
        return _rows("virtual tokens", store, {length: [name] for length, name in names.items()}, rounds)


def _rows(column: str, store: Path, names: Mapping[int, list[str]], rounds: int) -> list[Row]:
    with serving("--adapters", str(store)) as where:
        sides = {
            str(size): lambda n, adapters=adapters: speed(put(where.grpc, load(adapters, seed=n), 16))
            for size, adapters in {0: [BASE], **names}.items()
        }
        measured = interleave(sides, rounds)
    return [
        {column: int(size), **figures, "÷ base": figures["tokens/s"] / measured["0"]["tokens/s"]}
        for size, figures in measured.items()
    ]


RANK_EXPERIMENT = Experiment("ranks", ranks, Plot("rank", ("tokens/s",)))
VIRTUAL_TOKENS_EXPERIMENT = Experiment(
    "virtual-tokens", virtual_tokens, Plot("virtual tokens", ("tokens/s",))
)
