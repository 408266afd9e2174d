"""From one registered adapter to a thousand, requests spread over all of them by Zipf's law."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.suite.experiment import Experiment, Plot, Row, interleave, load, put, serving, speed
from benchmarks.suite.stores import lora_store
from polygraft.base.loader import inspect_without_weights
from polygraft.cli.bench.plan import Choice
from polygraft.cli.demo.launcher import Addresses
from polygraft.cli.demo.scrape import scrape

COUNTS = (1, 5, 20, 100, 1000)
REQUESTS = 48


def run(rounds: int) -> list[Row]:
    base = inspect_without_weights("default")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: dict[int, Addresses] = {}
        sides: dict[str, Callable[[int], dict[str, float]]] = {}
        for count in COUNTS:
            store = folder / str(count)
            names = lora_store(store, base, count)
            servers[count] = stack.enter_context(serving("--adapters", str(store)))
            sides[str(count)] = _side(servers[count].grpc, names)
            print(f"  {count} adapters are loaded", flush=True)
        measured = interleave(sides, rounds)
        return [
            {
                "registered": count,
                **measured[str(count)],
                "÷ 5 registered": measured[str(count)]["tokens/s"] / measured["5"]["tokens/s"],
                "resident, MB": scrape(servers[count].metrics).resident_bytes / 1e6,
            }
            for count in COUNTS
        ]


def _side(address: str, names: list[str]) -> Callable[[int], dict[str, float]]:
    return lambda n: speed(put(address, load(names, choice=Choice.ZIPF, seed=n), REQUESTS))


EXPERIMENT = Experiment("many-adapters", run, Plot("registered", ("tokens/s",), logarithmic=True))
