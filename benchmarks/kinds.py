"""What each kind of adapter costs a decode step of 16 rows, against the base alone in the same run.

    OMP_NUM_THREADS=2 python -m benchmarks.kinds [--quantization int8] [--rounds 3] [--only LoRA DoRA]
        [--document docs/performance.md]

All rows use one adapter of the kind, or four: the same weights under four names, which the engine keeps
apart. Kinds take turns, and each step is divided by the base's just before it. Each row's prompt is its own,
the same in every round, so that after the first (warm-up) the prefix cache has it. Prints a table.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from benchmarks.kind_adapters import write_kinds
from benchmarks.suite.document import insert, table
from polygraft.base.loader import inspect_without_weights
from polygraft.config import ServerConfig
from polygraft.engine.load_engine import load_engine
from polygraft_types.requests import AdapterRef, Request, StoppingParams

ROWS, CONTEXT, STEPS = 16, 64, 12
DISTINCT = (1, 4)
LIMIT = 1.35


class Steps:
    """Decode steps of one engine with every kind loaded."""

    def __init__(self, config: ServerConfig) -> None:
        self.engine = load_engine(config)
        self._sent = count(1)

    def milliseconds(self, adapters: Sequence[str | None]) -> float:
        """Median of a step with one row for each adapter named."""
        ids = []
        for row, name in enumerate(adapters):
            ids.append(str(next(self._sent)))
            prompt = tuple(1000 + (row * 7919 + i) % 30_000 for i in range(CONTEXT))
            stopping = StoppingParams(max_new_tokens=CONTEXT + STEPS, ignore_eos=True)
            named = () if name is None else (AdapterRef(name),)
            self.engine.submit(Request(ids[-1], prompt, adapters=named, stopping=stopping))
        seconds: list[float] = []
        while len(seconds) < STEPS:
            started = time.perf_counter()
            stats = self.engine.step().stats
            if stats is not None and stats.prefill_rows == 0 and stats.decode_rows == len(adapters):
                seconds.append(time.perf_counter() - started)
        for id in ids:
            self.engine.abort(id)
        return 1000 * statistics.median(seconds)


def write_store(store: Path, only: Sequence[str] | None) -> dict[str, list[str]]:
    """Adapters of each kind, all with the same weights, as many as share a step; returns names by kind."""
    kinds = {}
    for kind, name in write_kinds(store, inspect_without_weights("default"), only).items():
        kinds[kind] = [name, *(f"{name}-{copy}" for copy in range(1, max(DISTINCT)))]
        for copy in kinds[kind][1:]:
            (store / copy).mkdir()
            for file in (store / name).iterdir():
                os.link(file, store / copy / file.name)
    return kinds


def measure(steps: Steps, kinds: Mapping[str, Sequence[str]], rounds: int) -> list[dict[str, str]]:
    """A row for each kind, the dearest first."""
    ratios: dict[str, dict[int, list[float]]] = {kind: {n: [] for n in DISTINCT} for kind in kinds}
    for number in range(rounds + 1):
        for kind, names in kinds.items():
            # Beside each kind, since the machine drifts within a round as well.
            base = steps.milliseconds([None] * ROWS)
            for distinct, found in ratios[kind].items():
                step = steps.milliseconds([names[row * distinct // ROWS] for row in range(ROWS)])
                if number:
                    found.append(step / base)
        print(f"round {number} of {rounds}: the base's step takes {base:.1f} ms", flush=True)
    medians = {kind: {n: statistics.median(each) for n, each in by.items()} for kind, by in ratios.items()}
    served = steps.engine.adapters.registry
    return [
        {
            "kind": kind,
            "compiled, KB": f"{served.get(kinds[kind][0]).compiled_bytes / 1000:,.0f}",
            **{f"step ÷ base, {n} adapters": f"{ratio:.2f}" for n, ratio in by.items()},
            f"under {LIMIT}": "yes" if max(by.values()) < LIMIT else "no",
        }
        for kind, by in sorted(medians.items(), key=lambda item: -max(item[1].values()))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="KIND", help="leave the other kinds out")
    parser.add_argument("--document", type=Path, help="put the table between its markers")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kinds = write_store(Path(folder), arguments.only)
        steps = Steps(
            ServerConfig(
                adapters=Path(folder), quantization=arguments.quantization, dtype=arguments.dtype, threads=2,
                kv_cache_bytes=3 * 2**29,
            )
        )  # fmt: skip
        text = table(measure(steps, kinds, arguments.rounds))
    print(f"\n{text}")
    if arguments.document:
        precision = arguments.dtype if arguments.quantization == "none" else arguments.quantization
        insert(arguments.document, f"kinds-{precision}", text)


if __name__ == "__main__":
    main()
